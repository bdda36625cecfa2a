// Matrix products through torch's BLAS, or our own, on memory that is already there: no dispatcher,
// so neither autograd nor autocast sees them.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "packed_product.h"

namespace svf_fast {

template <typename T>
constexpr torch::headeronly::ScalarType kBlasType = torch::headeronly::ScalarType::Float;
template <>
inline constexpr torch::headeronly::ScalarType kBlasType<double> =
    torch::headeronly::ScalarType::Double;

// Uninitialised memory for `size` elements, T float or double, owned by the list.
template <typename T>
T* scratch(std::vector<torch::stable::Tensor>& owned, const torch::stable::Tensor& like,
           int64_t size) {
  owned.push_back(torch::stable::new_empty(like, {&size, 1}, kBlasType<T>));
  return static_cast<T*>(owned.back().mutable_data_ptr());
}

// [rows, columns] over memory of the caller, T float or double.
template <typename T>
torch::stable::Tensor matrix(const T* data, int64_t rows, int64_t columns, int64_t row_stride,
                             int64_t column_stride) {
  return torch::stable::from_blob(
      const_cast<T*>(data), {rows, columns}, {row_stride, column_stride},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), kBlasType<T>);
}

// out = a b
inline void multiply(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                     const torch::stable::Tensor& b) {
  if (multiplies_packed()) {
    return multiply_packed(out, false, a, b);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// [count, rows, columns] over memory of the caller, T float or double.
template <typename T>
torch::stable::Tensor matrices(const T* data, int64_t count, int64_t rows, int64_t columns,
                               int64_t stride, int64_t row_stride, int64_t column_stride) {
  return torch::stable::from_blob(
      const_cast<T*>(data), {count, rows, columns}, {stride, row_stride, column_stride},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), kBlasType<T>);
}

// out = a b, for each of a number of matrices
inline void multiply_each(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                          const torch::stable::Tensor& b) {
  if (multiplies_packed()) {
    return multiply_packed(out, false, a, b);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(out.get(), a.get(), b.get()));
}

// out = a b, or out += a b with `add`, for each of a number of matrices
inline void add_products(const torch::stable::Tensor& out, bool add, const torch::stable::Tensor& a,
                         const torch::stable::Tensor& b) {
  if (multiplies_packed()) {
    return multiply_packed(out, add, a, b);
  }
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_baddbmm_out(out.get(), out.get(), a.get(), b.get(), add ? 1.0 : 0.0, 1.0));
}

}  // namespace svf_fast
