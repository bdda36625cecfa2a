// affine_act on the CPU: one pass over the maps as they lie in memory. Units begin at multiples of
// 64 elements, so no two of them share a byte of the mask.
#include "../affine_act.h"

#include <algorithm>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "dispatch.h"
#include "gram.h"
#include "widen.h"

namespace svf_fast {
namespace {

constexpr int64_t kUnit = 16384;  // elements per unit of work
constexpr int64_t kBlock = 2048;  // elements whose mask is packed while they are in the L1 cache

template <typename T>
struct Forward {
  T* out;
  uint8_t* mask;  // null: none
  const T* y;
  const T* residual;
  const accumulator_t<T>* scale;
  const accumulator_t<T>* shift;
  const accumulator_t<T>* residual_scale;
  accumulator_t<T> floor;  // 0: ReLU, -inf: none
  Maps maps;
};

template <typename T>
struct Backward {
  T* out;
  const T* grad;
  const T* y;
  const uint8_t* mask;
  const accumulator_t<T>* scale;
  const accumulator_t<T>* shift;
  Maps maps;
};

// One value per channel: the same along a row of positions, or one per element of a row of
// channels.
template <int kBytes, bool kLast, typename Acc>
class Channels {
 public:
  using V = Vector<Acc, kBytes>;
  SVF_FAST_INLINE Channels(const Acc* values, int64_t channel)
      : row_(values + channel), same_(V{} + (kLast ? Acc(0) : values[channel])) {}
  SVF_FAST_INLINE V at(int64_t i) const {
    if constexpr (kLast) {
      return Memory<kBytes>::load(row_ + i);
    } else {
      return same_;
    }
  }
  // at most `count` lanes are there
  SVF_FAST_INLINE V part(int64_t i, int64_t count) const {
    if constexpr (kLast) {
      V value{};
      std::memcpy(&value, row_ + i, count * sizeof(Acc));
      return value;
    } else {
      return same_;
    }
  }

 private:
  const Acc* row_;
  V same_;
};

// Calls body(first element, count, channel) for each run of one row within [begin, end).
template <bool kLast, typename Body>
SVF_FAST_INLINE void for_each_run(const Maps& maps, int64_t begin, int64_t end, const Body& body) {
  const int64_t length = kLast ? maps.channels : maps.positions;
  while (begin < end) {
    const int64_t row = begin / length, offset = begin % length;
    const int64_t count = std::min(length - offset, end - begin);
    body(begin, count, kLast ? offset : row % maps.channels);
    begin += count;
  }
}

template <int kBytes, bool kLast, bool kResidual, typename T>
SVF_FAST_INLINE void forward_run(const Forward<T>& task, int64_t at, int64_t count,
                                 int64_t channel) {
  using Acc = accumulator_t<T>;
  using V = Vector<Acc, kBytes>;
  constexpr int64_t lanes = kBytes / sizeof(Acc);
  const Channels<kBytes, kLast, Acc> scale(task.scale, channel), shift(task.shift, channel);
  const Channels<kBytes, kLast, Acc> residual_scale(kResidual ? task.residual_scale : task.scale,
                                                    channel);
  const V floor = V{} + task.floor;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    V z = Memory<kBytes>::load(task.y + at + i) * scale.at(i) + shift.at(i);
    if constexpr (kResidual) {
      z += Memory<kBytes>::load(task.residual + at + i) * residual_scale.at(i);
    }
    Memory<kBytes>::store(task.out + at + i, z < floor ? floor : z);
  }
  if (i < count) {
    const int64_t rest = count - i;
    V z = load_part<kBytes>(task.y + at + i, rest) * scale.part(i, rest) + shift.part(i, rest);
    if constexpr (kResidual) {
      z += load_part<kBytes>(task.residual + at + i, rest) * residual_scale.part(i, rest);
    }
    store_part<kBytes>(task.out + at + i, z < floor ? floor : z, rest);
  }
}

// Eight elements to eight bits: true where the element is not <= 0, as ReLU's gradient has it.
template <typename T>
SVF_FAST_INLINE uint8_t pack_eight(const T* from) {
  uint64_t bytes = 0;
  if constexpr (sizeof(T) == 2) {  // 16-bit floats, by sign and magnitude; NaN counts as positive
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = from[i].bits;
      constexpr uint16_t infinity = std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;
      const bool passes = (bits != 0 && bits < 0x8000) || (bits & 0x7fff) > infinity;
      bytes |= static_cast<uint64_t>(passes) << (8 * i);
    }
  } else {
    Vector<T, 8 * sizeof(T)> value;
    std::memcpy(&value, from, sizeof(value));
    const auto passes = ~(value <= T(0));
    const auto narrow = __builtin_convertvector(passes, Vector<int8_t, 8>) & 1;
    bytes = bit_cast<uint64_t>(narrow);
  }
  return static_cast<uint8_t>((bytes * 0x0102040810204080u) >> 56);
}

template <typename T>
SVF_FAST_INLINE void pack(uint8_t* mask, const T* out, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) {
    mask[i / 8] = pack_eight(out + i);
  }
  if (i < end) {
    T padded[8] = {};
    std::memcpy(padded, out + i, (end - i) * sizeof(T));
    mask[i / 8] = pack_eight(padded);
  }
}

template <int kBytes, bool kLast, bool kResidual, typename T>
SVF_FAST_INLINE void forward(const Forward<T>& task, int64_t begin, int64_t end) {
  for (; begin < end; begin += kBlock) {
    const int64_t stop = std::min(begin + kBlock, end);
    for_each_run<kLast>(task.maps, begin, stop,
                        [&](int64_t at, int64_t count, int64_t channel) SVF_FAST_LAMBDA {
                          forward_run<kBytes, kLast, kResidual>(task, at, count, channel);
                        });
    if (task.mask != nullptr) {
      pack(task.mask, task.out, begin, stop);
    }
  }
}

// All ones in the lanes whose element, the i-th and those after it, passes.
template <int kBytes, typename Acc>
SVF_FAST_INLINE auto unpack(const uint8_t* mask, int64_t i) {
  constexpr int64_t lanes = kBytes / sizeof(Acc);
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  using V = Vector<Index, kBytes>;
  uint32_t bits;
  std::memcpy(&bits, mask + i / 8, sizeof(bits));
  V lane{};
  for (int64_t n = 0; n < lanes; ++n) {
    lane[n] = Index(1) << n;
  }
  return ((V{} + static_cast<Index>(bits >> (i % 8))) & lane) != 0;
}

template <int kBytes, bool kLast, bool kMask, typename T>
SVF_FAST_INLINE void backward_run(const Backward<T>& task, int64_t at, int64_t count,
                                  int64_t channel) {
  using Acc = accumulator_t<T>;
  using V = Vector<Acc, kBytes>;
  constexpr int64_t lanes = kBytes / sizeof(Acc);
  const Channels<kBytes, kLast, Acc> scale(task.scale, channel);
  const Channels<kBytes, kLast, Acc> shift(kMask ? task.scale : task.shift, channel);
  const V zero{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const V grad = Memory<kBytes>::load(task.grad + at + i) * scale.at(i);
    if constexpr (kMask) {
      const auto passes = unpack<kBytes, Acc>(task.mask, at + i);
      Memory<kBytes>::store(task.out + at + i, passes ? grad : zero);
    } else {
      const V z = Memory<kBytes>::load(task.y + at + i) * scale.at(i) + shift.at(i);
      Memory<kBytes>::store(task.out + at + i, z <= zero ? zero : grad);
    }
  }
  if (i < count) {
    const int64_t rest = count - i;
    const V grad = load_part<kBytes>(task.grad + at + i, rest) * scale.part(i, rest);
    if constexpr (kMask) {
      const auto passes = unpack<kBytes, Acc>(task.mask, at + i);
      store_part<kBytes>(task.out + at + i, passes ? grad : zero, rest);
    } else {
      const V z =
          load_part<kBytes>(task.y + at + i, rest) * scale.part(i, rest) + shift.part(i, rest);
      store_part<kBytes>(task.out + at + i, z <= zero ? zero : grad, rest);
    }
  }
}

template <int kBytes, bool kLast, bool kMask, typename T>
SVF_FAST_INLINE void backward(const Backward<T>& task, int64_t begin, int64_t end) {
  for_each_run<kLast>(task.maps, begin, end,
                      [&](int64_t at, int64_t count, int64_t channel) SVF_FAST_LAMBDA {
                        backward_run<kBytes, kLast, kMask>(task, at, count, channel);
                      });
}

// The loops over a map, for each instruction set.
template <bool kLast>
struct Loop {
  template <int kBytes, typename T>
  static SVF_FAST_INLINE void run(const Forward<T>& task, int64_t begin, int64_t end) {
    task.residual ? forward<kBytes, kLast, true>(task, begin, end)
                  : forward<kBytes, kLast, false>(task, begin, end);
  }
  template <int kBytes, typename T>
  static SVF_FAST_INLINE void run(const Backward<T>& task, int64_t begin, int64_t end) {
    task.mask ? backward<kBytes, kLast, true>(task, begin, end)
              : backward<kBytes, kLast, false>(task, begin, end);
  }
};

template <typename Task>
void run_units(const Task& task) {
  const int64_t elements = task.maps.batch * task.maps.channels * task.maps.positions;
  torch::stable::parallel_for(0, divide_up(elements, kUnit), 2, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kUnit, last = std::min(end * kUnit, elements);
    task.maps.channels_last ? run<Loop<true>>(task, first, last)
                            : run<Loop<false>>(task, first, last);
  });
}

template <typename T>
void run_forward(const AffineAct& operands, bool relu, const Tensor& out, uint8_t* mask) {
  using Acc = accumulator_t<T>;
  const std::vector<Acc> ones(operands.residual_scale ? 0 : operands.y.size(1), Acc(1));
  Forward<T> task{};
  task.out = static_cast<T*>(out.mutable_data_ptr());
  task.mask = mask;
  task.y = static_cast<const T*>(operands.y.const_data_ptr());
  task.residual = data<T>(operands.residual);
  task.scale = static_cast<const Acc*>(operands.scale.const_data_ptr());
  task.shift = static_cast<const Acc*>(operands.shift.const_data_ptr());
  task.residual_scale = operands.residual_scale ? data<Acc>(operands.residual_scale) : ones.data();
  task.floor = relu ? Acc(0) : -std::numeric_limits<Acc>::infinity();
  task.maps = maps_of(operands.y);
  run_units(task);
}

template <typename T>
void run_backward(const AffineActBackward& operands, const Tensor& out) {
  using Acc = accumulator_t<T>;
  const std::vector<Acc> ones(operands.scale ? 0 : operands.grad.size(1), Acc(1));
  Backward<T> task{};
  task.out = static_cast<T*>(out.mutable_data_ptr());
  task.grad = static_cast<const T*>(operands.grad.const_data_ptr());
  task.y = data<T>(operands.y);
  task.mask = data<uint8_t>(operands.mask);
  task.scale = operands.scale ? data<Acc>(operands.scale) : ones.data();
  task.shift = data<Acc>(operands.shift);
  task.maps = maps_of(operands.grad);
  run_units(task);
}

struct Passes {
  static void forward(const AffineAct& operands, bool relu, const Tensor& out, uint8_t* mask) {
    if (mask) {
      std::fill(mask + divide_up(out.numel(), 8), mask + mask_bytes(out.numel()), uint8_t(0));
    }
    with_type(out.scalar_type(), [&]<typename T>(T) { run_forward<T>(operands, relu, out, mask); });
  }

  static void backward(const AffineActBackward& operands, const Tensor& out) {
    with_type(out.scalar_type(), [&]<typename T>(T) { run_backward<T>(operands, out); });
  }
};

}  // namespace

void affine_act_backward_in_place(const Tensor& grad, const Tensor& y, const Tensor& scale,
                                  const Tensor& shift) {
  AffineActOps<Passes>::backward_in_place(grad, y, std::nullopt, scale, shift);
}

}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  svf_fast::AffineActOps<svf_fast::Passes>::enter(library);
}
