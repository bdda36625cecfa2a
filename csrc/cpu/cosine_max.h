// What cosine_max and its backward share: checks and the norms of columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "columns.h"
#include "dispatch.h"
#include "widen.h"

namespace svf_fast {

constexpr double kEpsilon = 1e-7;  // of the definition

// Euclidean norms of columns, summed in double. Units are positions.
struct Norms {
  template <int kBytes, typename T, typename Acc>
  static SVF_FAST_INLINE void run(const Columns<const T>& x, Acc* const& norms, int64_t begin,
                                  int64_t end) {
    using V = Vector<Acc, kBytes>;
    if (x.channels_inner) {
      for (int64_t p = begin; p < end; ++p) {
        DoubleSums<Acc, kBytes> sums;
        for_vectors<kBytes>(x.data + p * x.stride, x.channels,
                            [&](int64_t, const V& value, int64_t)
                                SVF_FAST_LAMBDA { sums.add(value, value); });
        norms[p] = static_cast<Acc>(std::sqrt(sums.sum()));
      }
      return;
    }
    constexpr int64_t kBlock = 1024;  // whole vectors
    double squares[kBlock];
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t width = std::min(kBlock, end - first);
      std::fill_n(squares, kBlock, 0.0);
      for (int64_t c = 0; c < x.channels; ++c) {
        for_vectors<kBytes>(x.data + c * x.stride + first, width,
                            [&](int64_t i, const V& value, int64_t) SVF_FAST_LAMBDA {
                              DoubleSums<Acc, kBytes> sums;
                              sums.load(squares + i);
                              sums.add(value, value);
                              sums.store(squares + i);
                            });
      }
      for (int64_t i = 0; i < width; ++i) {
        norms[first + i] = static_cast<Acc>(std::sqrt(squares[i]));
      }
    }
  }
};

template <typename T, typename Acc>
void norms_of(const Columns<const T>& x, Acc* norms) {
  torch::stable::parallel_for(0, x.positions, grain(x.channels), [&](int64_t begin, int64_t end) {
    run<Norms>(x, norms, begin, end);
  });
}

inline void check_cosine_max(const Tensor& query, const Tensor& support, const Tensor& mask) {
  STD_TORCH_CHECK(is_supported(query.scalar_type()), "cosine_max: unsupported dtype");
  STD_TORCH_CHECK(query.scalar_type() == support.scalar_type(),
                  "cosine_max: query and support differ in dtype");
  STD_TORCH_CHECK(mask.scalar_type() == accumulation_type(query.scalar_type()),
                  "cosine_max: mask must be float32, or float64 for float64 maps");
  STD_TORCH_CHECK(query.device() == support.device() && query.device() == mask.device(),
                  "cosine_max: inputs differ in device");
  STD_TORCH_CHECK(query.dim() == 3 && support.dim() == 3 && mask.dim() == 2,
                  "cosine_max: inputs must be [B, C, N], [B, C, M] and [B, M]");
  STD_TORCH_CHECK(support.size(0) == query.size(0) && support.size(1) == query.size(1) &&
                      mask.size(0) == query.size(0) && mask.size(1) == support.size(2),
                  "cosine_max: inputs differ in shape");
  STD_TORCH_CHECK(support.size(2) > 0, "cosine_max: no support position");
  STD_TORCH_CHECK(support.size(2) <= std::numeric_limits<int32_t>::max(),
                  "cosine_max: too many support positions");
}

}  // namespace svf_fast
