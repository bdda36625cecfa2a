// One image [C, P] as the matrix products see it, and how its passes are shared out.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "../maps.h"

namespace svf_fast {

constexpr int64_t kGrain = 32768;  // elements that are worth a thread

// Units that are worth a thread.
inline int64_t grain(int64_t elements_of_a_unit) {
  return divide_up(kGrain, std::max<int64_t>(1, elements_of_a_unit));
}

// One image [C, P] of which either the positions or the channels of a row are neighbours.
template <typename T>
struct Columns {
  T* data;
  int64_t channels;
  int64_t positions;
  int64_t stride;  // from row to row
  bool channels_inner;

  int64_t channel_stride() const { return channels_inner ? 1 : stride; }
  int64_t position_stride() const { return channels_inner ? stride : 1; }
  Columns slice(int64_t first, int64_t count) const {
    return {data + first * position_stride(), channels, count, stride, channels_inner};
  }
};

inline bool is_channels_inner(const Tensor& x) {
  return x.size(1) > 1 && x.stride(1) == 1 && x.stride(2) > 1;
}

inline Tensor as_type(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

// x as it lies in memory where that is as written, else a copy.
inline Tensor dense_rows(const Tensor& x) {
  return is_dense(x, false) ? x : torch::stable::contiguous(x);
}

inline Tensor readable(const Tensor& x) {
  return x.stride(2) == 1 || is_channels_inner(x) ? x : torch::stable::contiguous(x);
}

template <typename T>
Columns<T> columns(const Tensor& x, int64_t image) {
  const bool inner = is_channels_inner(x);
  T* data = static_cast<T*>(const_cast<void*>(x.const_data_ptr())) + image * x.stride(0);
  return {data, x.size(1), x.size(2), x.stride(inner ? 2 : 1), inner};
}

}  // namespace svf_fast
