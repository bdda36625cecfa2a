// What the CPU and the CUDA kernels of channel_dot share: checks and the layout of the operands.
#pragma once

#include <utility>

#include "maps.h"

namespace svf_fast {

struct ChannelDotOperands {
  Tensor a;
  Tensor b;
  Maps maps;
};

inline ChannelDotOperands channel_dot_operands(const Tensor& a, const Tensor& b) {
  check_same_maps("channel_dot", a, b);
  Tensor dense = is_dense(a) ? a : torch::stable::contiguous(a);
  Tensor other = with_strides_of(b, dense);
  const Maps maps = maps_of(dense);
  return {std::move(dense), std::move(other), maps};
}

inline ChannelDotOperands channel_dot_scale_operands(const Tensor& a, const Tensor& v,
                                                     const Tensor& s) {
  check_same_maps("channel_dot_scale_", a, v);
  STD_TORCH_CHECK(is_dense(a), "channel_dot_scale_: a must be contiguous or channels_last");
  STD_TORCH_CHECK(s.scalar_type() == accumulation_type(a.scalar_type()),
                  "channel_dot_scale_: s must be float32, or float64 for float64 maps");
  STD_TORCH_CHECK(s.device() == a.device(), "channel_dot_scale_: s is on another device");
  STD_TORCH_CHECK(s.dim() == 1 && s.size(0) == a.size(1), "channel_dot_scale_: s must be [C]");
  STD_TORCH_CHECK(s.is_contiguous(), "channel_dot_scale_: s must be contiguous");
  Tensor other = with_strides_of(v, a);
  STD_TORCH_CHECK(!overlap_in_part(a, other), "channel_dot_scale_: a and v share memory");
  return {a, std::move(other), maps_of(a)};
}

inline Tensor empty_channels(const Tensor& like) {
  const int64_t channels = like.size(1);
  return torch::stable::new_empty(like, {&channels, 1}, accumulation_type(like.scalar_type()));
}

}  // namespace svf_fast
