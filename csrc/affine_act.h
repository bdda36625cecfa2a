// What the kernels of affine_act share: checks, the layout of the operands, the size of a mask.
//
// A mask holds one bit per element of a dense map, in the order of its memory: element i is bit
// i % 8 of byte i / 8. It is longer than that by at least eight bytes, so that any eight bytes from
// one that holds an element can be read at once.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "maps.h"

namespace svf_fast {

inline int64_t mask_bytes(int64_t elements) { return elements / 64 * 8 + 16; }

inline Tensor dense(const Tensor& x) { return is_dense(x) ? x : torch::stable::contiguous(x); }

inline void check_channels(const char* op, const char* name, const Tensor& vector,
                           const Tensor& map) {
  STD_TORCH_CHECK(vector.scalar_type() == accumulation_type(map.scalar_type()), op, ": ", name,
                  " must be float32, or float64 for float64 maps");
  STD_TORCH_CHECK(vector.device() == map.device(), op, ": ", name, " is on another device");
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == map.size(1) && vector.is_contiguous(), op,
                  ": ", name, " must be a contiguous [C]");
}

struct AffineAct {
  Tensor y;
  Tensor scale;
  Tensor shift;
  std::optional<Tensor> residual;
  std::optional<Tensor> residual_scale;
};

inline AffineAct affine_act_operands(const Tensor& y, const Tensor& scale, const Tensor& shift,
                                     const std::optional<Tensor>& residual,
                                     const std::optional<Tensor>& residual_scale) {
  const char* op = "affine_act";
  check_same_maps(op, y, residual.value_or(y));
  check_channels(op, "scale", scale, y);
  check_channels(op, "shift", shift, y);
  AffineAct operands{dense(y), scale, shift, std::nullopt, residual_scale};
  if (residual) {
    operands.residual = with_strides_of(*residual, operands.y);
  }
  if (residual_scale) {
    check_channels(op, "residual_scale", *residual_scale, y);
  }
  return operands;
}

struct AffineActBackward {
  Tensor grad;
  std::optional<Tensor> y;
  std::optional<Tensor> mask;
  std::optional<Tensor> scale;
  std::optional<Tensor> shift;
};

// grad comes in the layout of y; with a mask it must have the one the mask was made in.
inline AffineActBackward affine_act_backward_operands(const Tensor& grad,
                                                      const std::optional<Tensor>& y,
                                                      const std::optional<Tensor>& mask,
                                                      const std::optional<Tensor>& scale,
                                                      const std::optional<Tensor>& shift) {
  const char* op = "affine_act_backward";
  check_same_maps(op, grad, y.value_or(grad));
  STD_TORCH_CHECK(y.has_value() != mask.has_value(), op, ": expected either y or mask");
  if (scale) {
    check_channels(op, "scale", *scale, grad);
  }
  if (y) {
    STD_TORCH_CHECK(scale && shift, op, ": scale and shift are needed with y");
    check_channels(op, "shift", *shift, grad);
    Tensor from = dense(*y);
    return {with_strides_of(grad, from), from, mask, scale, shift};
  }
  STD_TORCH_CHECK(is_dense(grad), op, ": with a mask grad must be contiguous or channels_last");
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->is_contiguous() &&
                      mask->device() == grad.device() && mask->numel() == mask_bytes(grad.numel()),
                  op, ": mask must be the one affine_act returned for this shape");
  return {grad, y, mask, scale, shift};
}

}  // namespace svf_fast
