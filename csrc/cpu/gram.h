// What is read off Gram matrices on the CPU is made of these, without going through the dispatcher.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace svf_fast {

using torch::stable::Tensor;

Tensor channel_dot(const Tensor& a, const Tensor& b);

Tensor gram(const Tensor& a, const Tensor& b, int64_t groups, const std::optional<Tensor>& scale,
            const std::optional<Tensor>& shift, const std::optional<Tensor>& grid = std::nullopt);

Tensor gram_gradient(const Tensor& M, const Tensor& left, const Tensor& right, const Tensor& S);

// dL/dy = scale * grad where y * scale + shift > 0, in the place of grad.
void affine_act_backward_in_place(const Tensor& grad, const Tensor& y, const Tensor& scale,
                                  const Tensor& shift);

}  // namespace svf_fast
