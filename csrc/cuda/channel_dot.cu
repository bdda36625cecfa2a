// channel_dot on CUDA in two passes without atomics: every warp (rows) or block (columns) leaves
// one partial sum per channel, and a second kernel adds these in a fixed order.
#include "../channel_dot.h"

#include <torch/csrc/stable/library.h>

#include "launch.h"

namespace svf_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kSegment = 4096;  // elements of a row summed by one warp
constexpr int kDepth = 16;      // positions summed by one thread, channels last

// sums[j] += a[j] * b[j] and a[j] *= scale[j], for kSize elements aligned to their total size.
template <bool kScale, int kSize, typename T, typename Acc>
__device__ void step(Acc (&sums)[kSize], T* a, const T* b, const Acc (&scale)[kSize]) {
  auto left = load<kSize>(static_cast<const T*>(a));
  const auto right = load<kSize>(b);
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const Acc value = widen(left.values[j]);
    sums[j] += value * widen(right.values[j]);
    if constexpr (kScale) {
      narrow(left.values[j], value * scale[j]);
    }
  }
  if constexpr (kScale) {
    store(a, left);
  }
}

template <typename Acc>
__device__ Acc sum_warp(Acc value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Maps [batch, channels, positions]: a warp per (image, channel, segment of kSegment positions).
// a and b are aligned alike: both are peeled up to the first 16-byte boundary.
template <bool kScale, int kVecSize, typename T>
__global__ void __launch_bounds__(kThreads)
    channel_dot_rows_kernel(T* a, const T* b, const accumulator_t<T>* s, accumulator_t<T>* partial,
                            int64_t rows, int64_t channels, int64_t positions, int64_t segments) {
  using Acc = accumulator_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (unit >= rows * segments) {
    return;
  }
  const int64_t row = unit / segments;
  const int64_t first = unit % segments * kSegment;
  const int count = static_cast<int>(positions - first < kSegment ? positions - first : kSegment);
  a += row * positions + first;
  b += row * positions + first;

  Acc scale[kVecSize];
  Acc sums[kVecSize] = {};
  const Acc factor = kScale ? s[row % channels] : Acc(0);
#pragma unroll
  for (int j = 0; j < kVecSize; ++j) {
    scale[j] = factor;
  }
  const Acc(&one_scale)[1] = {factor};
  Acc rest[1] = {};

  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(a) % (kVecSize * sizeof(T)));
  const int gap = (kVecSize - past / static_cast<int>(sizeof(T))) % kVecSize;
  const int head = gap < count ? gap : count;
  const int vectors = (count - head) / kVecSize;
  const int tail = head + vectors * kVecSize;
  if (lane < head) {
    step<kScale>(rest, a + lane, b + lane, one_scale);
  }
#pragma unroll 4
  for (int i = lane; i < vectors; i += kWarp) {
    step<kScale>(sums, a + head + i * kVecSize, b + head + i * kVecSize, scale);
  }
  if (tail + lane < count) {
    step<kScale>(rest, a + tail + lane, b + tail + lane, one_scale);
  }
  Acc sum = rest[0];
#pragma unroll
  for (int j = 0; j < kVecSize; ++j) {
    sum += sums[j];
  }
  sum = sum_warp(sum);
  if (lane == 0) {
    partial[unit] = sum;
  }
}

// Maps [positions, channels]: threads (x, y) take kVecSize channels and every blockDim.y-th of
// kDepth * blockDim.y positions; blockDim is two powers of two.
template <bool kScale, int kVecSize, typename T>
__global__ void __launch_bounds__(kThreads)
    channel_dot_columns_kernel(T* a, const T* b, const accumulator_t<T>* s,
                               accumulator_t<T>* partial, int64_t positions, int64_t channels,
                               int64_t column_blocks) {
  using Acc = accumulator_t<T>;
  __shared__ Acc shared[kThreads * kVecSize];
  const int64_t block = blockIdx.x / column_blocks;
  const int64_t column = blockIdx.x % column_blocks * blockDim.x + threadIdx.x;
  const int64_t channel = column * kVecSize;
  const bool inside = channel < channels;
  const int64_t first = block * kDepth * blockDim.y;

  Acc sums[kVecSize] = {};
  if (inside) {
    Acc scale[kVecSize] = {};
    if constexpr (kScale) {
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) {
        scale[j] = s[channel + j];
      }
    }
#pragma unroll 4
    for (int i = 0; i < kDepth; ++i) {
      const int64_t position = first + static_cast<int64_t>(i) * blockDim.y + threadIdx.y;
      if (position < positions) {
        step<kScale>(sums, a + position * channels + channel, b + position * channels + channel,
                     scale);
      }
    }
  }
  Acc* mine = shared + (threadIdx.y * blockDim.x + threadIdx.x) * kVecSize;
#pragma unroll
  for (int j = 0; j < kVecSize; ++j) {
    mine[j] = sums[j];
  }
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) {
        mine[j] += mine[half * blockDim.x * kVecSize + j];
      }
    }
  }
  if (inside && threadIdx.y == 0) {
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) {
      partial[block * channels + channel + j] = mine[j];
    }
  }
}

// out[c] = sum of partial[o, c, i] over outer and inner, a warp per channel.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    channel_dot_sum_kernel(const Acc* partial, Acc* out, int64_t channels, int64_t outer,
                           int64_t inner) {
  const int lane = threadIdx.x % kWarp;
  const int64_t channel =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (channel >= channels) {
    return;
  }
  double sum = 0;
  for (int64_t i = lane; i < outer * inner; i += kWarp) {
    sum += partial[(i / inner * channels + channel) * inner + i % inner];
  }
  sum = sum_warp(sum);
  if (lane == 0) {
    out[channel] = static_cast<Acc>(sum);
  }
}

template <bool kScale, int kVecSize, typename T>
void run_vectors(const Stream& stream, const ChannelDotOperands& operands, const Tensor* s,
                 const Tensor& out) {
  using Acc = accumulator_t<T>;
  const Maps& maps = operands.maps;
  T* a = static_cast<T*>(
      const_cast<void*>(kScale ? operands.a.mutable_data_ptr() : operands.a.const_data_ptr()));
  const T* b = static_cast<const T*>(operands.b.const_data_ptr());
  const Acc* scale = kScale ? static_cast<const Acc*>(s->const_data_ptr()) : nullptr;
  const auto new_partial = [&](int64_t size) { return torch::stable::new_empty(out, {&size, 1}); };
  constexpr int kWarps = kThreads / kWarp;
  int64_t outer, inner;
  Tensor partial = out;
  if (maps.channels_last) {
    const int64_t positions = maps.batch * maps.positions;
    const int64_t columns = divide_up(maps.channels, kVecSize);
    unsigned width = 1;
    while (width < kWarp && width < columns) {
      width *= 2;
    }
    const dim3 threads(width, kThreads / width);
    const int64_t column_blocks = divide_up(columns, width);
    outer = divide_up(positions, static_cast<int64_t>(kDepth) * threads.y);
    inner = 1;
    partial = new_partial(outer * maps.channels);
    stream.launch(channel_dot_columns_kernel<kScale, kVecSize, T>, outer * column_blocks, threads,
                  a, b, scale, static_cast<Acc*>(partial.mutable_data_ptr()), positions,
                  maps.channels, column_blocks);
  } else {
    outer = maps.batch;
    inner = divide_up(maps.positions, kSegment);
    const int64_t rows = maps.batch * maps.channels;
    partial = new_partial(rows * inner);
    stream.launch(channel_dot_rows_kernel<kScale, kVecSize, T>, divide_up(rows * inner, kWarps),
                  kThreads, a, b, scale, static_cast<Acc*>(partial.mutable_data_ptr()), rows,
                  maps.channels, maps.positions, inner);
  }
  stream.launch(channel_dot_sum_kernel<Acc>, divide_up(maps.channels, kWarps), kThreads,
                static_cast<const Acc*>(partial.const_data_ptr()),
                static_cast<Acc*>(out.mutable_data_ptr()), maps.channels, outer, inner);
}

template <bool kScale, typename T>
void run(const Stream& stream, const ChannelDotOperands& operands, const Tensor* s,
         const Tensor& out) {
  constexpr int kVecSize = kAccess / sizeof(T);
  const auto a = reinterpret_cast<uintptr_t>(operands.a.const_data_ptr());
  const auto b = reinterpret_cast<uintptr_t>(operands.b.const_data_ptr());
  const bool vectors = operands.maps.channels_last ? operands.maps.channels % kVecSize == 0 &&
                                                         a % kAccess == 0 && b % kAccess == 0
                                                   : a % kAccess == b % kAccess;
  if (vectors) {
    run_vectors<kScale, kVecSize, T>(stream, operands, s, out);
  } else {
    run_vectors<kScale, 1, T>(stream, operands, s, out);
  }
}

template <bool kScale>
Tensor dispatch(const ChannelDotOperands& operands, const Tensor* s) {
  Tensor out = empty_channels(operands.a);
  if (operands.a.numel() == 0) {
    return torch::stable::zero_(out);
  }
  const Stream stream(out);
  with_type(operands.a.scalar_type(),
            [&]<typename T>(T) { run<kScale, T>(stream, operands, s, out); });
  return out;
}

Tensor channel_dot(const Tensor& a, const Tensor& b) {
  return dispatch<false>(channel_dot_operands(a, b), nullptr);
}

Tensor channel_dot_scale_(const Tensor& a, const Tensor& v, const Tensor& s) {
  return dispatch<true>(channel_dot_scale_operands(a, v, s), &s);
}

}  // namespace
}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CUDA, library) {
  library.impl("channel_dot", TORCH_BOX(&svf_fast::channel_dot));
  library.impl("channel_dot_scale_", TORCH_BOX(&svf_fast::channel_dot_scale_));
}
