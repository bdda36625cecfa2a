// dL/dS of `gram` on the CPU, from maps: the Gram matrix, and what is read off it, in one call.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../maps.h"
#include "gram.h"
#include "quantize.h"

namespace svf_fast {
namespace {

Tensor scale_gradient(const Tensor& a, const Tensor& b, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& shift, const Tensor& left, const Tensor& right,
                      const Tensor& S, const std::optional<Tensor>& grid) {
  STD_TORCH_CHECK(left.dim() == 3 && S.dim() == 1 && S.numel() == left.size(0) * left.size(2),
                  "scale_gradient: left must be [G, Ca, R] and S [G * R]");
  const int64_t groups = left.size(0);
  const Tensor values = torch::stable::reshape(S, {groups, left.size(2)});
  if (!scale && !grid && a.dim() >= 2 && a.size(1) == groups && b.dim() >= 2 &&
      b.size(1) == groups) {
    const Tensor M = torch::stable::reshape(channel_dot(a, b), {groups, 1, 1});
    return gram_gradient(M, left, right, values);
  }
  return gram_gradient(gram(a, b, groups, scale, shift, grid), left, right, values);
}

std::tuple<Tensor, Tensor> activation_gradients_(const Tensor& grad, const Tensor& y,
                                                 const Tensor& scale, const Tensor& shift,
                                                 const std::vector<Tensor>& before,
                                                 const std::vector<Tensor>& after,
                                                 const std::optional<Tensor>& grid) {
  for (const auto& side : {&before, &after}) {
    STD_TORCH_CHECK(side->empty() || side->size() == 3,
                    "activation_gradients_: a side is left, right and S, or nothing");
  }
  const auto nothing = [&] {
    return torch::stable::new_empty(scale, {0}, accumulation_type(grad.scalar_type()));
  };
  Tensor behind = after.empty()
                      ? nothing()
                      : scale_gradient(y, grad, scale, shift, after[0], after[1], after[2], grid);
  grid ? quantized_backward_in_place(grad, y, *grid, scale)
       : affine_act_backward_in_place(grad, y, scale, shift);
  Tensor ahead = before.empty() ? nothing()
                                : scale_gradient(grad, y, std::nullopt, std::nullopt, before[0],
                                                 before[1], before[2], grid);
  return {std::move(ahead), std::move(behind)};
}

}  // namespace
}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  library.impl("scale_gradient", TORCH_BOX(&svf_fast::scale_gradient));
  library.impl("activation_gradients_", TORCH_BOX(&svf_fast::activation_gradients_));
}
