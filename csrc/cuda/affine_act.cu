// affine_act on CUDA: one pass over the maps as they lie in memory, as vectors of 16 bytes. A
// thread takes every stride-th vector. Channels last, the stride is a multiple of the row, so the
// channels of a thread never change and their scale stays in registers; otherwise position and
// channel are carried along by addition. A vector of 8 elements owns a byte of the mask; of fewer,
// neighbouring lanes gather one.
#include "../affine_act.h"

#include <algorithm>
#include <numeric>

#include <torch/csrc/stable/library.h>

#include "launch.h"

namespace svf_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 4;  // blocks that fit on a multiprocessor: 64 registers a thread

// Vectors a thread has in flight of the one operand it reads, or of each of the two.
constexpr int kDepthOfOne = 3, kDepthOfTwo = 2;

template <typename T>
struct Forward {
  T* out;
  uint8_t* mask;  // null: none
  int64_t mask_bytes;
  const T* y;
  const T* residual;
  const accumulator_t<T>* scale;
  const accumulator_t<T>* shift;
  const accumulator_t<T>* residual_scale;  // null: 1
  accumulator_t<T> floor;                  // 0: ReLU, -inf: none
};

template <typename T>
struct Backward {
  T* out;
  const T* grad;
  const T* y;
  const uint8_t* mask;
  const accumulator_t<T>* scale;  // null: 1
  const accumulator_t<T>* shift;
};

// The way of a grid through a map.
struct Span {
  int64_t elements;
  int64_t stride;      // vectors from one of a thread to its next
  uint32_t positions;  // 1: channels last
  uint32_t channels;
  uint32_t step_position;  // what `stride` adds to the position in a row and, with a carry, to
  uint32_t step_channel;   // the channel
};

// Where a thread is: at the vector it takes next.
template <bool kLast, int kVecSize>
class Cursor {
 public:
  __device__ explicit Cursor(const Span& span) : span_(span) {
    const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
    block_ = static_cast<int64_t>(blockIdx.x) * kThreads * kVecSize;
    if constexpr (kLast) {
      channel_ = thread % (span.channels / kVecSize) * kVecSize;
    } else {
      position_ = thread * kVecSize % span.positions;
      channel_ = thread * kVecSize / span.positions % span.channels;
    }
  }

  // Whether the next `vectors` of all threads of the block are there in full.
  __device__ bool whole(int vectors) const {
    return block_ + (kThreads + (vectors - 1) * span_.stride) * kVecSize <= span_.elements;
  }
  // Whether some thread of the block has a vector left: whole warps stay together.
  __device__ bool block_inside() const { return block_ < span_.elements; }

  __device__ int64_t element(int ahead = 0) const {
    return block_ + threadIdx.x * kVecSize + ahead * span_.stride * kVecSize;
  }

  // Elements of the vector that are there.
  __device__ int count() const {
    const int64_t rest = span_.elements - element();
    return rest >= kVecSize ? kVecSize : rest > 0 ? static_cast<int>(rest) : 0;
  }

  __device__ uint32_t channel() const { return channel_; }
  __device__ uint32_t next_channel() const {
    return channel_ + 1 == span_.channels ? 0 : channel_ + 1;
  }
  // Elements of the vector from `channel`; the others are from `next_channel`.
  __device__ uint32_t before_next() const { return span_.positions - position_; }

  __device__ void advance() {
    block_ += span_.stride * kVecSize;
    if constexpr (!kLast) {
      position_ += span_.step_position;
      channel_ += span_.step_channel;
      if (position_ >= span_.positions) {
        position_ -= span_.positions;
        ++channel_;
      }
      channel_ -= channel_ >= span_.channels ? span_.channels : 0;
    }
  }

 private:
  const Span& span_;
  int64_t block_;  // first element of the block's vectors
  uint32_t position_ = 0;
  uint32_t channel_;
};

// One value per channel (null: 1), for the elements of a vector.
template <bool kLast, int kVecSize, typename Acc>
class Channels {
 public:
  __device__ void read(const Acc* values, const Cursor<kLast, kVecSize>& at) {
    if constexpr (kLast) {
      if (values != nullptr) {
        row_ = load<kVecSize>(values + at.channel());
      } else {
#pragma unroll
        for (int j = 0; j < kVecSize; ++j) {
          row_.values[j] = 1;
        }
      }
    } else {
      first_ = values != nullptr ? values[at.channel()] : Acc(1);
      second_ = first_;
      before_ = at.before_next();
      if (before_ < kVecSize && values != nullptr) {
        second_ = values[at.next_channel()];
      }
    }
  }

  __device__ Acc operator[](int j) const {
    if constexpr (kLast) {
      return row_.values[j];
    } else {
      return j < before_ ? first_ : second_;
    }
  }

 private:
  Pack<Acc, kVecSize> row_;
  Acc first_, second_;
  uint32_t before_;
};

template <bool kLast, bool kResidual, int kVecSize, typename T>
struct ForwardChannels {
  Channels<kLast, kVecSize, accumulator_t<T>> scale, shift, residual_scale;

  __device__ void read(const Forward<T>& task, const Cursor<kLast, kVecSize>& at) {
    scale.read(task.scale, at);
    shift.read(task.shift, at);
    if constexpr (kResidual) {
      residual_scale.read(task.residual_scale, at);
    }
  }
};

template <bool kLast, bool kMask, int kVecSize, typename T>
struct BackwardChannels {
  Channels<kLast, kVecSize, accumulator_t<T>> scale, shift;

  __device__ void read(const Backward<T>& task, const Cursor<kLast, kVecSize>& at) {
    scale.read(task.scale, at);
    if constexpr (!kMask) {
      shift.read(task.shift, at);
    }
  }
};

// The first `count` elements of a vector: all, when kWhole.
template <bool kWhole, int kVecSize, typename T>
__device__ void load(Pack<T, kVecSize>& pack, const T* from, int count) {
  if constexpr (!kWhole) {
    if (count < kVecSize) {
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) {
        if (j < count) {
          pack.values[j] = from[j];
        }
      }
      return;
    }
  }
  pack = svf_fast::load<kVecSize>(from);
}

template <bool kWhole, int kVecSize, typename T>
__device__ void store(T* to, const Pack<T, kVecSize>& pack, int count) {
  if constexpr (!kWhole) {
    if (count < kVecSize) {
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) {
        if (j < count) {
          to[j] = pack.values[j];
        }
      }
      return;
    }
  }
  svf_fast::store(to, pack);
}

// Writes one bit per element. Called by whole warps, whose vectors lie side by side.
template <int kVecSize>
__device__ void write_bits(uint8_t* mask, uint32_t bits, int64_t element, int count) {
  bits &= (1u << count) - 1;
  if constexpr (kVecSize == 1) {
    bits = __ballot_sync(0xffffffffu, bits) >> (threadIdx.x % kWarp / 8 * 8);
  } else if constexpr (kVecSize < 8) {
    bits <<= element % 8;
#pragma unroll
    for (int lanes = 1; lanes < 8 / kVecSize; lanes *= 2) {
      bits |= __shfl_xor_sync(0xffffffffu, bits, lanes);
    }
  }
  if (count > 0 && element % 8 == 0) {
    mask[element / 8] = static_cast<uint8_t>(bits);
  }
}

// Takes the next kDepth vectors; all of them are there when kWhole.
template <bool kWhole, int kDepth, bool kResidual, bool kLast, int kVecSize, typename T>
__device__ void forward(const Forward<T>& task, Cursor<kLast, kVecSize>& at,
                        ForwardChannels<kLast, kResidual, kVecSize, T>& channels) {
  using Acc = accumulator_t<T>;
  Pack<T, kVecSize> y[kDepth], residual[kDepth];
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    const int count = kWhole ? kVecSize : at.count();
    load<kWhole>(y[i], task.y + at.element(i), count);
    if constexpr (kResidual) {
      load<kWhole>(residual[i], task.residual + at.element(i), count);
    }
  }
#pragma unroll
  for (int i = 0; i < kDepth; ++i, at.advance()) {
    const int count = kWhole ? kVecSize : at.count();
    if constexpr (!kLast) {
      channels.read(task, at);
    }
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) {
      Acc z = fma(widen(y[i].values[j]), channels.scale[j], channels.shift[j]);
      if constexpr (kResidual) {
        z = fma(widen(residual[i].values[j]), channels.residual_scale[j], z);
      }
      T& out = y[i].values[j];
      narrow(out, z < task.floor ? task.floor : z);
      bits |= (widen(out) <= 0 ? 0u : 1u) << j;  // NaN passes, as in ReLU's gradient
    }
    store<kWhole>(task.out + at.element(), y[i], count);
    if (task.mask != nullptr) {
      write_bits<kVecSize>(task.mask, bits, at.element(), count);
    }
  }
}

template <bool kLast, bool kResidual, int kVecSize, typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    affine_act_kernel(Forward<T> task, Span span) {
  constexpr int kDepth = kResidual ? kDepthOfTwo : kDepthOfOne;
  Cursor<kLast, kVecSize> at(span);
  ForwardChannels<kLast, kResidual, kVecSize, T> channels;
  if constexpr (kLast) {
    channels.read(task, at);
  }
  while (at.whole(kDepth)) {
    forward<true, kDepth, kResidual>(task, at, channels);
  }
  while (at.block_inside()) {
    forward<false, 1, kResidual>(task, at, channels);
  }
  const int64_t used = (span.elements + 7) / 8;
  if (task.mask != nullptr && blockIdx.x == 0 && used + threadIdx.x < task.mask_bytes) {
    task.mask[used + threadIdx.x] = 0;
  }
}

template <bool kWhole, int kDepth, bool kMask, bool kLast, int kVecSize, typename T>
__device__ void backward(const Backward<T>& task, Cursor<kLast, kVecSize>& at,
                         BackwardChannels<kLast, kMask, kVecSize, T>& channels) {
  using Acc = accumulator_t<T>;
  Pack<T, kVecSize> grad[kDepth], y[kDepth];
  uint32_t bits[kDepth];
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    const int64_t element = at.element(i);
    const int count = kWhole ? kVecSize : at.count();
    load<kWhole>(grad[i], task.grad + element, count);
    if constexpr (kMask) {
      bits[i] = count > 0 ? task.mask[element / 8] >> element % 8 : 0;
    } else {
      load<kWhole>(y[i], task.y + element, count);
    }
  }
#pragma unroll
  for (int i = 0; i < kDepth; ++i, at.advance()) {
    if constexpr (!kLast) {
      channels.read(task, at);
    }
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) {
      bool passes;
      if constexpr (kMask) {
        passes = bits[i] >> j & 1;
      } else {
        passes = !(fma(widen(y[i].values[j]), channels.scale[j], channels.shift[j]) <= 0);
      }
      T& out = grad[i].values[j];
      narrow(out, passes ? widen(out) * channels.scale[j] : Acc(0));
    }
    store<kWhole>(task.out + at.element(), grad[i], kWhole ? kVecSize : at.count());
  }
}

template <bool kLast, bool kMask, int kVecSize, typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    affine_act_backward_kernel(Backward<T> task, Span span) {
  constexpr int kDepth = kMask ? kDepthOfOne : kDepthOfTwo;
  Cursor<kLast, kVecSize> at(span);
  BackwardChannels<kLast, kMask, kVecSize, T> channels;
  if constexpr (kLast) {
    channels.read(task, at);
  }
  while (at.whole(kDepth)) {
    backward<true, kDepth, kMask>(task, at, channels);
  }
  while (at.block_inside()) {
    backward<false, 1, kMask>(task, at, channels);
  }
}

struct Grid {
  int64_t blocks;
  Span span;
};

// As many blocks as run at once, or fewer: each thread takes its share of the vectors.
template <int kVecSize>
Grid grid_of(const Stream& stream, const Maps& maps, int depth) {
  const int64_t elements = maps.batch * maps.channels * maps.positions;
  // with one channel a row may be cut anywhere
  const int64_t positions = maps.channels_last   ? 1
                            : maps.channels == 1 ? std::min<int64_t>(maps.positions, 1 << 30)
                                                 : maps.positions;
  STD_TORCH_CHECK(positions < int64_t(1) << 31 && maps.channels < int64_t(1) << 31,
                  "affine_act: maps of 2^31 positions or channels are not supported");
  int64_t blocks = std::min<int64_t>(divide_up(elements, int64_t(kVecSize) * kThreads * depth),
                                     kResident * stream.multiprocessors());
  if (maps.channels_last) {
    const int64_t columns = maps.channels / kVecSize;
    const int64_t together = columns / std::gcd(columns, int64_t(kThreads));
    blocks = std::max<int64_t>(blocks / together, 1) * together;
    STD_TORCH_CHECK(blocks < 1 << 23, "affine_act: 2^23 channels and more are not supported");
  }
  const int64_t stride = blocks * kThreads, step = stride * kVecSize;
  return {blocks,
          {elements, stride, static_cast<uint32_t>(positions), static_cast<uint32_t>(maps.channels),
           static_cast<uint32_t>(step % positions),
           static_cast<uint32_t>(step / positions % maps.channels)}};
}

// Whether rows are made of whole vectors (channels last), or hold one at least, so that a vector
// lies in two rows at most.
template <int kVecSize>
bool fits(const Maps& maps) {
  return maps.channels_last ? maps.channels % kVecSize == 0 : maps.positions >= kVecSize;
}

template <bool kLast, int kVecSize, typename T>
void launch(const Stream& stream, const Forward<T>& task, const Maps& maps) {
  const Grid grid =
      grid_of<kVecSize>(stream, maps, task.residual != nullptr ? kDepthOfTwo : kDepthOfOne);
  const auto kernel = task.residual != nullptr ? affine_act_kernel<kLast, true, kVecSize, T>
                                               : affine_act_kernel<kLast, false, kVecSize, T>;
  stream.launch(kernel, grid.blocks, kThreads, task, grid.span);
}

template <bool kLast, int kVecSize, typename T>
void launch(const Stream& stream, const Backward<T>& task, const Maps& maps) {
  const Grid grid =
      grid_of<kVecSize>(stream, maps, task.mask != nullptr ? kDepthOfOne : kDepthOfTwo);
  const auto kernel = task.mask != nullptr ? affine_act_backward_kernel<kLast, true, kVecSize, T>
                                           : affine_act_backward_kernel<kLast, false, kVecSize, T>;
  stream.launch(kernel, grid.blocks, kThreads, task, grid.span);
}

template <typename T, template <typename> typename Task>
void run(const Stream& stream, const Task<T>& task, const Maps& maps, bool aligned) {
  constexpr int kVecSize = kAccess / sizeof(T);
  const bool vectors = aligned && fits<kVecSize>(maps);
  if (maps.channels_last) {
    vectors ? launch<true, kVecSize>(stream, task, maps) : launch<true, 1>(stream, task, maps);
  } else {
    vectors ? launch<false, kVecSize>(stream, task, maps) : launch<false, 1>(stream, task, maps);
  }
}

template <typename T>
void run_forward(const Stream& stream, const AffineAct& operands, bool relu, const Tensor& out,
                 uint8_t* mask) {
  using Acc = accumulator_t<T>;
  Forward<T> task{};
  task.out = static_cast<T*>(out.mutable_data_ptr());
  task.mask = mask;
  task.mask_bytes = mask_bytes(out.numel());
  task.y = data<T>(operands.y);
  task.residual = data<T>(operands.residual);
  task.scale = data<Acc>(operands.scale);
  task.shift = data<Acc>(operands.shift);
  task.residual_scale = data<Acc>(operands.residual_scale);
  task.floor = relu ? Acc(0) : -std::numeric_limits<Acc>::infinity();
  const Maps maps = maps_of(operands.y);
  const bool aligned =
      are_aligned(task.out, task.y, task.residual) &&
      (!maps.channels_last || are_aligned(task.scale, task.shift, task.residual_scale));
  run(stream, task, maps, aligned);
}

template <typename T>
void run_backward(const Stream& stream, const AffineActBackward& operands, const Tensor& out) {
  using Acc = accumulator_t<T>;
  Backward<T> task{};
  task.out = static_cast<T*>(out.mutable_data_ptr());
  task.grad = data<T>(operands.grad);
  task.y = data<T>(operands.y);
  task.mask = data<uint8_t>(operands.mask);
  task.scale = data<Acc>(operands.scale);
  task.shift = data<Acc>(operands.shift);
  const Maps maps = maps_of(operands.grad);
  const bool aligned = are_aligned(task.out, task.grad, task.y) &&
                       (!maps.channels_last || are_aligned(task.scale, task.shift));
  run(stream, task, maps, aligned);
}

struct Passes {
  static void forward(const AffineAct& operands, bool relu, const Tensor& out, uint8_t* mask) {
    const Stream stream(out);
    with_type(out.scalar_type(),
              [&]<typename T>(T) { run_forward<T>(stream, operands, relu, out, mask); });
  }

  static void backward(const AffineActBackward& operands, const Tensor& out) {
    const Stream stream(out);
    with_type(out.scalar_type(), [&]<typename T>(T) { run_backward<T>(stream, operands, out); });
  }
};

}  // namespace
}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CUDA, library) {
  svf_fast::AffineActOps<svf_fast::Passes>::enter(library);
}
