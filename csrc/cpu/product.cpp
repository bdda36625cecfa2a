// product on the CPU: a 1x1 convolution of maps as they lie, as a matrix product.
#include <optional>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../maps.h"
#include "packed_product.h"

namespace svf_fast {
namespace {

using torch::stable::from_blob;

// [N, D, H, W] in the memory order of x.
Tensor maps_like(const Tensor& x, int64_t channels, bool last) {
  const int64_t height = x.size(2), width = x.size(3);
  const std::vector<int64_t> sizes{x.size(0), channels, height, width};
  const std::vector<int64_t> strides =
      last ? std::vector<int64_t>{height * width * channels, 1, width * channels, channels}
           : std::vector<int64_t>{channels * height * width, height * width, width, 1};
  return empty_strided(sizes, strides, x.scalar_type(), x.device());
}

// out = W x at each position, or out += W x. Channels last it is one product over all positions,
// else one an image.
void multiply_into(const Tensor& out, bool add, const Tensor& x, const Tensor& weight, bool last) {
  const auto device = x.device();
  const auto type = x.scalar_type();
  const int64_t images = x.size(0), positions = x.size(2) * x.size(3);
  const int64_t inputs = weight.size(1), outputs = weight.size(0);
  auto* to = out.mutable_data_ptr();
  auto* from = const_cast<void*>(x.const_data_ptr());
  auto* factor = const_cast<void*>(weight.const_data_ptr());
  const int64_t row = weight.stride(0), column = weight.stride(1);
  const double beta = add ? 1.0 : 0.0;
  const bool packed = multiplies_packed() && accumulation_type(type) == type;
  if (last) {
    const int64_t rows = images * positions;
    const Tensor y = from_blob(to, {rows, outputs}, {outputs, 1}, device, type);
    const Tensor a = from_blob(from, {rows, inputs}, {inputs, 1}, device, type);
    const Tensor b = from_blob(factor, {inputs, outputs}, {column, row}, device, type);
    if (packed) {
      return multiply_packed(y, add, a, b);
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), y.get(), a.get(), b.get(), beta, 1.0));
    return;
  }
  const Tensor y = from_blob(to, {images, outputs, positions}, {outputs * positions, positions, 1},
                             device, type);
  const Tensor a = from_blob(factor, {images, outputs, inputs}, {0, row, column}, device, type);
  const Tensor b = from_blob(from, {images, inputs, positions}, {inputs * positions, positions, 1},
                             device, type);
  if (packed) {
    return multiply_packed(y, add, a, b);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(y.get(), y.get(), a.get(), b.get(), beta, 1.0));
}

void check(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(is_supported(x.scalar_type()) && weight.scalar_type() == x.scalar_type(),
                  "product: x and weight must be floating point numbers of one dtype");
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 2 && weight.size(1) == x.size(1),
                  "product: x must be [N, C, H, W] and weight [D, C]");
}

Tensor product(const Tensor& x, const Tensor& weight) {
  check(x, weight);
  const Tensor maps = is_dense(x) ? x : torch::stable::contiguous(x);
  const bool last = !is_dense(maps, false);
  Tensor out = maps_like(maps, weight.size(0), last);
  if (out.numel() > 0) {
    if (x.size(1) == 0) {
      return torch::stable::zero_(out);
    }
    multiply_into(out, false, maps, weight, last);
  }
  return out;
}

void product_add_(const Tensor& out, const Tensor& x, const Tensor& weight) {
  check(x, weight);
  STD_TORCH_CHECK(out.dim() == 4 && out.scalar_type() == x.scalar_type() && is_dense(out) &&
                      out.size(0) == x.size(0) && out.size(1) == weight.size(0) &&
                      out.size(2) == x.size(2) && out.size(3) == x.size(3),
                  "product_add_: out must be dense [N, D, H, W] in the dtype of x");
  if (out.numel() == 0 || x.size(1) == 0) {
    return;
  }
  const bool last = !is_dense(out, false);
  if (is_dense(x, last)) {
    return multiply_into(out, true, x, weight, last);
  }
  const Tensor copy = maps_like(x, x.size(1), last);
  torch::stable::copy_(const_cast<Tensor&>(copy), x);
  multiply_into(out, true, copy, weight, last);
}

}  // namespace
}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  library.impl("product", TORCH_BOX(&svf_fast::product));
  library.impl("product_add_", TORCH_BOX(&svf_fast::product_add_));
}
