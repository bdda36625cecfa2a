// channel_dot on the CPU. Work is cut into units that depend on the shape alone, each leaves one
// double per channel, and these are summed in a fixed order: the result does not depend on the
// number of threads.
#include "../channel_dot.h"

#include <algorithm>
#include <cmath>

#include <torch/csrc/stable/library.h>

#include "dispatch.h"
#include "gram.h"
#include "vector.h"

namespace svf_fast {
namespace {

constexpr int64_t kUnit = 16384;  // elements a unit reads at least, where there are as many
constexpr int64_t kDepth = 32;    // terms a lane sums before its sum joins a double
constexpr int64_t kTile = 1024;   // channels accumulated at once, channels last

template <typename T>
struct Task {
  T* a;
  const T* b;
  const accumulator_t<T>* scale;  // null: a is only read
  double* partial;                // [outer, channels, inner]
  Maps maps;
  int64_t rows;     // images a unit spans; channels last: positions of all images
  int64_t segment;  // elements of a row a unit spans; channels last: unused
};

// A sum in double whose rounding errors are summed apart (Neumaier 1974).
class Sum {
 public:
  SVF_FAST_INLINE void add(double term) {
    const double next = sum_ + term;
    lost_ += std::abs(sum_) < std::abs(term) ? (term - next) + sum_ : (sum_ - next) + term;
    sum_ = next;
  }
  // infinities make the errors NaN
  SVF_FAST_INLINE double value() const { return lost_ == lost_ ? sum_ + lost_ : sum_; }

 private:
  double sum_ = 0;
  double lost_ = 0;
};

template <int kBytes, typename T>
constexpr int64_t kLanes = kBytes / sizeof(accumulator_t<T>);

// sum += a * b on one vector, and a *= scale.
template <int kBytes, bool kScale, typename T, typename V>
SVF_FAST_INLINE void step(V& sum, T* a, const T* b, const V& scale) {
  const V value = Memory<kBytes>::load(a);
  sum += value * Memory<kBytes>::load(b);
  if constexpr (kScale) {
    Memory<kBytes>::store(a, value * scale);
  }
}

// The same on the first `count` elements of a vector.
template <int kBytes, bool kScale, typename T, typename V>
SVF_FAST_INLINE void step_part(V& sum, T* a, const T* b, const V& scale, int64_t count) {
  T padded_a[kLanes<kBytes, T>] = {};
  T padded_b[kLanes<kBytes, T>] = {};
  std::memcpy(padded_a, a, count * sizeof(T));
  std::memcpy(padded_b, b, count * sizeof(T));
  step<kBytes, kScale>(sum, padded_a, padded_b, scale);
  if constexpr (kScale) {
    std::memcpy(a, padded_a, count * sizeof(T));
  }
}

template <int kBytes, bool kScale, typename T>
SVF_FAST_INLINE accumulator_t<T> dot_run(T* a, const T* b, accumulator_t<T> factor, int64_t count) {
  using Acc = accumulator_t<T>;
  using V = Vector<Acc, kBytes>;
  constexpr int64_t lanes = kLanes<kBytes, T>;
  const V scale = V{} + factor;
  V sum0{}, sum1{}, sum2{}, sum3{};
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    step<kBytes, kScale>(sum0, a + i, b + i, scale);
    step<kBytes, kScale>(sum1, a + i + lanes, b + i + lanes, scale);
    step<kBytes, kScale>(sum2, a + i + 2 * lanes, b + i + 2 * lanes, scale);
    step<kBytes, kScale>(sum3, a + i + 3 * lanes, b + i + 3 * lanes, scale);
  }
  for (; i + lanes <= count; i += lanes) {
    step<kBytes, kScale>(sum0, a + i, b + i, scale);
  }
  if (i < count) {
    step_part<kBytes, kScale>(sum1, a + i, b + i, scale, count - i);
  }
  return sum_lanes<Acc, kBytes>((sum0 + sum1) + (sum2 + sum3));
}

// Units (outer, channel, inner): `rows` images, one channel, `segment` positions.
template <int kBytes, bool kScale, typename T>
SVF_FAST_INLINE void channels_first(const Task<T>& task, int64_t begin, int64_t end) {
  const auto& [batch, channels, positions, channels_last] = task.maps;
  const int64_t segments = divide_up(positions, task.segment);
  constexpr int64_t run = kDepth / 2 * 4 * kLanes<kBytes, T>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % segments * task.segment;
    const int64_t last = std::min(first + task.segment, positions);
    const int64_t channel = unit / segments % channels;
    const int64_t image = unit / segments / channels * task.rows;
    accumulator_t<T> factor = 0;
    if constexpr (kScale) {
      factor = task.scale[channel];
    }
    Sum total;
    for (int64_t n = image; n < std::min(image + task.rows, batch); ++n) {
      const int64_t row = (n * channels + channel) * positions;
      for (int64_t i = first; i < last; i += run) {
        total.add(dot_run<kBytes, kScale>(task.a + row + i, task.b + row + i, factor,
                                          std::min(run, last - i)));
      }
    }
    task.partial[unit] = total.value();
  }
}

// sums[c] += a[r, c] * b[r, c] over kRows rows, and a[r, c] *= scale[c].
template <int kBytes, bool kScale, int kRows, typename T>
SVF_FAST_INLINE void add_rows(accumulator_t<T>* sums, T* a, const T* b,
                              const accumulator_t<T>* scale, int64_t width, int64_t stride) {
  using Acc = accumulator_t<T>;
  using V = Vector<Acc, kBytes>;
  constexpr int64_t lanes = kLanes<kBytes, T>;
  V factor{};
  int64_t c = 0;
  for (; c + lanes <= width; c += lanes) {
    V even{}, odd{};
    if constexpr (kScale) {
      factor = Memory<kBytes>::load(scale + c);
    }
    for (int row = 0; row < kRows; ++row) {
      step<kBytes, kScale>(row % 2 ? odd : even, a + row * stride + c, b + row * stride + c,
                           factor);
    }
    Memory<kBytes>::store(sums + c, Memory<kBytes>::load(sums + c) + (even + odd));
  }
  if (c < width) {
    V even{}, odd{};
    if constexpr (kScale) {
      std::memcpy(&factor, scale + c, (width - c) * sizeof(Acc));
    }
    for (int row = 0; row < kRows; ++row) {
      step_part<kBytes, kScale>(row % 2 ? odd : even, a + row * stride + c, b + row * stride + c,
                                factor, width - c);
    }
    Memory<kBytes>::store(sums + c, Memory<kBytes>::load(sums + c) + (even + odd));
  }
}

// Units: `rows` positions of all images, every channel.
template <int kBytes, bool kScale, typename T>
SVF_FAST_INLINE void channels_last(const Task<T>& task, int64_t begin, int64_t end) {
  using Acc = accumulator_t<T>;
  const int64_t channels = task.maps.channels;
  const int64_t positions = task.maps.batch * task.maps.positions;
  alignas(64) Acc sums[kTile];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t last = std::min((unit + 1) * task.rows, positions);
    for (int64_t tile = 0; tile < channels; tile += kTile) {
      const int64_t width = std::min(kTile, channels - tile);
      const Acc* scale = kScale ? task.scale + tile : nullptr;
      double* partial = task.partial + unit * channels + tile;
      std::fill_n(partial, width, 0.0);
      for (int64_t row = unit * task.rows; row < last;) {
        std::fill_n(sums, kTile, Acc(0));
        const int64_t stop = std::min(row + kDepth, last);
        for (; row + 4 <= stop; row += 4) {
          const int64_t at = row * channels + tile;
          add_rows<kBytes, kScale, 4>(sums, task.a + at, task.b + at, scale, width, channels);
        }
        for (; row < stop; ++row) {
          const int64_t at = row * channels + tile;
          add_rows<kBytes, kScale, 1>(sums, task.a + at, task.b + at, scale, width, channels);
        }
        for (int64_t c = 0; c < width; ++c) {
          partial[c] += sums[c];
        }
      }
    }
  }
}

template <bool kScale>
struct Units {
  template <int kBytes, typename T>
  static SVF_FAST_INLINE void run(const Task<T>& task, int64_t begin, int64_t end) {
    task.maps.channels_last ? channels_last<kBytes, kScale>(task, begin, end)
                            : channels_first<kBytes, kScale>(task, begin, end);
  }
};

// Sum of partial[o, channel, i] over outer and inner.
double sum_partial(const double* partial, int64_t channel, int64_t channels, int64_t outer,
                   int64_t inner) {
  Sum sum;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      sum.add(partial[(o * channels + channel) * inner + i]);
    }
  }
  return sum.value();
}

template <bool kScale, typename T>
void compute(const ChannelDotOperands& operands, const Tensor* s, const Tensor& out) {
  using Acc = accumulator_t<T>;
  const Maps& maps = operands.maps;
  Task<T> task{};
  task.a = static_cast<T*>(
      const_cast<void*>(kScale ? operands.a.mutable_data_ptr() : operands.a.const_data_ptr()));
  task.b = static_cast<const T*>(operands.b.const_data_ptr());
  task.scale = kScale ? static_cast<const Acc*>(s->const_data_ptr()) : nullptr;
  task.maps = maps;
  int64_t outer, inner;
  if (maps.channels_last) {
    const int64_t positions = maps.batch * maps.positions;
    task.rows = std::clamp(4 * kUnit / maps.channels, 2 * kDepth, kUnit);
    outer = divide_up(positions, task.rows);
    inner = 1;
  } else {
    task.rows = std::max<int64_t>(1, kUnit / maps.positions);
    task.segment = kUnit;
    outer = divide_up(maps.batch, task.rows);
    inner = divide_up(maps.positions, task.segment);
  }
  std::vector<double> partial(outer * maps.channels * inner);
  task.partial = partial.data();
  const int64_t units = maps.channels_last ? outer : outer * maps.channels * inner;
  const int64_t elements = maps.batch * maps.channels * maps.positions;
  const int64_t grain = divide_up(2 * kUnit * units, elements);
  torch::stable::parallel_for(
      0, units, grain, [&](int64_t begin, int64_t end) { run<Units<kScale>>(task, begin, end); });
  Acc* result = static_cast<Acc*>(out.mutable_data_ptr());
  for (int64_t channel = 0; channel < out.numel(); ++channel) {
    result[channel] =
        static_cast<Acc>(sum_partial(partial.data(), channel, maps.channels, outer, inner));
  }
}

template <bool kScale>
Tensor dispatch(const ChannelDotOperands& operands, const Tensor* s) {
  Tensor out = empty_channels(operands.a);
  if (operands.a.numel() == 0) {
    return torch::stable::zero_(out);
  }
  with_type(operands.a.scalar_type(), [&]<typename T>(T) { compute<kScale, T>(operands, s, out); });
  return out;
}

Tensor channel_dot_scale_(const Tensor& a, const Tensor& v, const Tensor& s) {
  return dispatch<true>(channel_dot_scale_operands(a, v, s), &s);
}

}  // namespace

Tensor channel_dot(const Tensor& a, const Tensor& b) {
  return dispatch<false>(channel_dot_operands(a, b), nullptr);
}

}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  library.impl("channel_dot", TORCH_BOX(&svf_fast::channel_dot));
  library.impl("channel_dot_scale_", TORCH_BOX(&svf_fast::channel_dot_scale_));
}
