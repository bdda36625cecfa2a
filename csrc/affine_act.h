// What the kernels of affine_act share: checks, the layout of the operands, the size of a mask.
//
// A mask holds one bit per element of a dense map, in the order of its memory: element i is bit
// i % 8 of byte i / 8. It is longer than that by at least eight bytes, so that any eight bytes from
// one that holds an element can be read at once.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include <torch/csrc/stable/library.h>

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

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// The four ops of a device, from its two passes over elements:
//   Passes::forward(operands, relu, out, mask)  fills out, which may be y, and mask, unless null
//   Passes::backward(operands, out)             fills out, which may be grad
template <typename Passes>
struct AffineActOps {
  static Tensor forward_into(const AffineAct& operands, bool relu, bool mask, const Tensor& out) {
    const int64_t bytes = mask ? mask_bytes(out.numel()) : 0;
    Tensor bits = torch::stable::new_empty(out, {&bytes, 1}, ScalarType::Byte);
    if (out.numel() == 0) {
      return torch::stable::zero_(bits);
    }
    auto* packed = mask ? static_cast<uint8_t*>(bits.mutable_data_ptr()) : nullptr;
    Passes::forward(operands, relu, out, packed);
    return bits;
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& y, const Tensor& scale,
                                            const Tensor& shift,
                                            const std::optional<Tensor>& residual,
                                            const std::optional<Tensor>& residual_scale, bool relu,
                                            bool mask) {
    const auto operands = affine_act_operands(y, scale, shift, residual, residual_scale);
    Tensor out = empty_strided_like(operands.y);
    Tensor bits = forward_into(operands, relu, mask, out);
    return {std::move(out), std::move(bits)};
  }

  static Tensor forward_in_place(const Tensor& y, const Tensor& scale, const Tensor& shift,
                                 const std::optional<Tensor>& residual,
                                 const std::optional<Tensor>& residual_scale, bool relu,
                                 bool mask) {
    STD_TORCH_CHECK(is_dense(y), "affine_act_: y must be contiguous or channels_last");
    const auto operands = affine_act_operands(y, scale, shift, residual, residual_scale);
    return forward_into(operands, relu, mask, y);
  }

  static void backward_into(const AffineActBackward& operands, const Tensor& out) {
    if (out.numel() > 0) {
      Passes::backward(operands, out);
    }
  }

  static Tensor backward(const Tensor& grad, const std::optional<Tensor>& y,
                         const std::optional<Tensor>& mask, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift) {
    const auto operands = affine_act_backward_operands(grad, y, mask, scale, shift);
    Tensor out = empty_strided_like(operands.grad);
    backward_into(operands, out);
    return out;
  }

  static void backward_in_place(const Tensor& grad, const std::optional<Tensor>& y,
                                const std::optional<Tensor>& mask,
                                const std::optional<Tensor>& scale,
                                const std::optional<Tensor>& shift) {
    STD_TORCH_CHECK(is_dense(grad),
                    "affine_act_backward_: grad must be contiguous or channels_last");
    std::optional<Tensor> like = y;
    if (y) {
      like = with_strides_of(*y, grad);
    }
    backward_into(affine_act_backward_operands(grad, like, mask, scale, shift), grad);
  }

  template <typename Library>
  static void enter(Library& library) {
    library.impl("affine_act", TORCH_BOX(&AffineActOps::forward));
    library.impl("affine_act_", TORCH_BOX(&AffineActOps::forward_in_place));
    library.impl("affine_act_backward", TORCH_BOX(&AffineActOps::backward));
    library.impl("affine_act_backward_", TORCH_BOX(&AffineActOps::backward_in_place));
  }
};

}  // namespace svf_fast
