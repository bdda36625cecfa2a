// Maps kept in 8 bits, as the loops over them read them: svf_fast/reference/quantize.py has the
// definition.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

#include <torch/csrc/stable/tensor.h>

#include "widen.h"

namespace svf_fast {

// The grid [3, N, C] of a quantized map, from some channel of some image on: a code q stands for
// offset + step * q, and the ReLU passes where q >= first.
template <typename Acc>
struct Grid {
  const Acc* offset = nullptr;
  const Acc* step = nullptr;
  const Acc* first = nullptr;

  Grid from(int64_t channel) const { return {offset + channel, step + channel, first + channel}; }
};

template <typename Acc>
Grid<Acc> grid_of(const torch::stable::Tensor& grid) {
  const auto* values = static_cast<const Acc*>(grid.const_data_ptr());
  const int64_t size = grid.numel() / 3;
  return {values, values + size, values + 2 * size};
}

// Integers as wide as the numbers that they become.
template <typename Acc>
using Whole = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;

// `count` codes as numbers, and zeros behind them.
template <int kBytes, typename Acc>
SVF_FAST_INLINE Vector<Acc, kBytes> load_codes(const uint8_t* from, int64_t count) {
  constexpr int64_t lanes = kBytes / sizeof(Acc);
  Vector<uint8_t, lanes> codes{};
  if (count == lanes) {
    std::memcpy(&codes, from, lanes);
  } else {
    std::memcpy(&codes, from, count);
  }
  const auto whole = __builtin_convertvector(codes, Vector<Whole<Acc>, kBytes>);
  return __builtin_convertvector(whole, Vector<Acc, kBytes>);
}

// Whole numbers from 0 to 255, held as floating-point numbers, to memory.
template <int kBytes, typename Acc>
SVF_FAST_INLINE void store_codes(uint8_t* to, const Vector<Acc, kBytes>& value, int64_t count) {
  constexpr int64_t lanes = kBytes / sizeof(Acc);
  const auto whole = __builtin_convertvector(value, Vector<Whole<Acc>, kBytes>);
  const auto codes = __builtin_convertvector(whole, Vector<uint8_t, lanes>);
  if (count == lanes) {
    std::memcpy(to, &codes, lanes);
  } else {
    std::memcpy(to, &codes, count);
  }
}

// Values of `count` neighbours: one a channel, or one for all where the neighbours are positions.
template <int kBytes, bool kChannels, typename Acc>
SVF_FAST_INLINE Vector<Acc, kBytes> per_channel(const Acc* values, int64_t i, int64_t count) {
  if constexpr (kChannels) {
    return load_part<kBytes>(values + i, count);
  } else {
    return Vector<Acc, kBytes>{} + values[0];
  }
}

// What `count` neighbouring codes stand for in T; with a scale relu(value * scale + shift), whose
// mask the codes tell. Out: T, or the type that it is accumulated in.
template <int kBytes, bool kChannels, typename T, typename Acc, typename Out>
SVF_FAST_INLINE void decode(const uint8_t* codes, int64_t count, const Grid<Acc>& grid,
                            const Acc* scale, const Acc* shift, Out* out) {
  using V = Vector<Acc, kBytes>;
  constexpr int64_t lanes = kBytes / sizeof(Acc);
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t part = std::min(lanes, count - i);
    const auto at = [&](const Acc* values)
                        SVF_FAST_LAMBDA { return per_channel<kBytes, kChannels>(values, i, part); };
    const V code = load_codes<kBytes, Acc>(codes + i, part);
    V value = rounded<kBytes, T>(at(grid.offset) + at(grid.step) * code);
    if (scale) {
      const V z = value * at(scale) + at(shift);
      const V activated = rounded<kBytes, T>(z < V{} ? V{} : z);  // NaN stays
      value = code >= at(grid.first) ? activated : V{};
    }
    store_part<kBytes>(out + i, value, part);
  }
}

void check_quantized(const char* op, const torch::stable::Tensor& codes,
                     const torch::stable::Tensor& grid, torch::headeronly::ScalarType type);

// dL/dy = scale * grad where the ReLU passed, by the codes of y, in the place of grad.
void quantized_backward_in_place(const torch::stable::Tensor& grad,
                                 const torch::stable::Tensor& codes,
                                 const torch::stable::Tensor& grid,
                                 const torch::stable::Tensor& scale);

}  // namespace svf_fast
