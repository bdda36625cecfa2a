// How a tensor [N, C, *spatial] lies in memory, for kernels that treat channels apart.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace svf_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Dense maps: [batch, channels, positions] in memory, or [batch * positions, channels] when
// channels_last. A shape that is both ways dense is stored as the way with the longer rows.
struct Maps {
  int64_t batch;
  int64_t channels;
  int64_t positions;
  bool channels_last;
};

inline bool is_dense(const Tensor& x, bool channels_last) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  int64_t expected = 1;
  const auto step = [&](int64_t dim) {
    const bool fits = sizes[dim] == 1 || strides[dim] == expected;
    expected *= sizes[dim];
    return fits;
  };
  if (channels_last && !step(1)) {
    return false;
  }
  for (int64_t dim = x.dim() - 1; dim >= 0; --dim) {
    if (!(channels_last && dim == 1) && !step(dim)) {
      return false;
    }
  }
  return true;
}

inline bool is_dense(const Tensor& x) {
  return x.numel() == 0 || is_dense(x, false) || is_dense(x, true);
}

inline Maps maps_of(const Tensor& x) {
  Maps maps{x.size(0), x.size(1), 1, false};
  for (int64_t dim = 2; dim < x.dim(); ++dim) {
    maps.positions *= x.size(dim);
  }
  maps.channels_last = !is_dense(x, false);
  if (maps.channels == 1) {
    maps = {1, 1, maps.batch * maps.positions, false};
  } else if (maps.positions == 1) {
    maps.channels_last = true;
  }
  return maps;
}

// Uninitialised.
inline Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType type,
                            const torch::stable::Device& device) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())),
      device.index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_strided_like(const Tensor& like, ScalarType type) {
  return empty_strided(like.sizes(), like.strides(), type, like.device());
}

inline Tensor empty_strided_like(const Tensor& like) {
  return empty_strided_like(like, like.scalar_type());
}

// x itself if its strides are those of the dense tensor `like`, else a copy that has them.
inline Tensor with_strides_of(const Tensor& x, const Tensor& like) {
  bool same = true;
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    same = same && (x.size(dim) == 1 || x.stride(dim) == like.stride(dim));
  }
  if (same) {
    return x;
  }
  Tensor copy = empty_strided_like(like);
  torch::stable::copy_(copy, x);
  return copy;
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Guard for memory safety behind the checks made in Python.
inline void check_same_maps(const char* op, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(is_supported(a.scalar_type()), op, ": unsupported dtype");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), op, ": inputs differ in dtype");
  STD_TORCH_CHECK(a.device() == b.device(), op, ": inputs differ in device");
  STD_TORCH_CHECK(a.dim() >= 2 && a.dim() == b.dim(), op, ": inputs must be [N, C, *spatial]");
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    STD_TORCH_CHECK(a.size(dim) == b.size(dim), op, ": inputs differ in shape");
  }
}

// Whether two dense tensors of one shape and dtype share part of their memory but not all of it.
inline bool overlap_in_part(const Tensor& a, const Tensor& b) {
  const auto* first = static_cast<const char*>(a.const_data_ptr());
  const auto* second = static_cast<const char*>(b.const_data_ptr());
  const auto bytes = a.numel() * static_cast<int64_t>(a.element_size());
  return first != second && first < second + bytes && second < first + bytes;
}

}  // namespace svf_fast
