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

// [N, C, P] as it lies in memory: a map whose positions are counted in one dimension, without the
// tensor that a reshape would make.
class Flat {
 public:
  // Of [N, C, *spatial], copied where neither its positions nor its channels are neighbours.
  explicit Flat(const Tensor& x) : owner_(x) {
    if (!fold() || (stride_[2] != 1 && !(size_[1] > 1 && stride_[1] == 1 && stride_[2] > 1))) {
      owner_ = torch::stable::contiguous(x);
      fold();
    }
    data_ = owner_.const_data_ptr();
  }

  int64_t size(int dim) const { return size_[dim]; }
  int64_t stride(int dim) const { return stride_[dim]; }
  const void* const_data_ptr() const { return data_; }
  const Tensor& tensor() const { return owner_; }

 private:
  // Whether the positions have a common stride.
  bool fold() {
    const auto sizes = owner_.sizes();
    const auto strides = owner_.strides();
    for (int dim = 0; dim < 2; ++dim) {
      size_[dim] = sizes[dim];
      stride_[dim] = strides[dim];
    }
    size_[2] = stride_[2] = 1;
    for (int64_t dim = owner_.dim() - 1; dim >= 2; --dim) {
      if (sizes[dim] == 1) {
        continue;
      }
      if (size_[2] == 1) {
        stride_[2] = strides[dim];
      } else if (strides[dim] != stride_[2] * size_[2]) {
        return false;
      }
      size_[2] *= sizes[dim];
    }
    return true;
  }

  Tensor owner_;
  int64_t size_[3];
  int64_t stride_[3];
  const void* data_ = nullptr;
};

template <typename X>
bool is_channels_inner(const X& x) {
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

template <typename T, typename X>
Columns<T> columns(const X& x, int64_t image) {
  const bool inner = is_channels_inner(x);
  T* data = static_cast<T*>(const_cast<void*>(x.const_data_ptr())) + image * x.stride(0);
  return {data, x.size(1), x.size(2), x.stride(inner ? 2 : 1), inner};
}

}  // namespace svf_fast
