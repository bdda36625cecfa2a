// Rows between storage and accumulation type, whole vectors at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector.h"

namespace svf_fast {

// `count` values, and zeros behind them.
template <int kBytes, typename T>
SVF_FAST_INLINE auto load_part(const T* from, int64_t count) {
  constexpr int64_t lanes = kBytes / sizeof(accumulator_t<T>);
  if (count == lanes) {
    return Memory<kBytes>::load(from);
  }
  T padded[lanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return Memory<kBytes>::load(padded);
}

// Calls body(offset, vector, count) for each vector of `row`; the last one may be part zeros.
template <int kBytes, typename T, typename Body>
SVF_FAST_INLINE void for_vectors(const T* row, int64_t count, const Body& body) {
  constexpr int64_t lanes = kBytes / sizeof(accumulator_t<T>);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    body(i, Memory<kBytes>::load(row + i), lanes);
  }
  if (i < count) {
    body(i, load_part<kBytes>(row + i, count - i), count - i);
  }
}

// The first `count` lanes to memory, rounded to T.
template <int kBytes, typename T, typename V>
SVF_FAST_INLINE void store_part(T* to, const V& value, int64_t count) {
  constexpr int64_t lanes = kBytes / sizeof(accumulator_t<T>);
  if (count == lanes) {
    Memory<kBytes>::store(to, value);
    return;
  }
  T padded[lanes];
  Memory<kBytes>::store(padded, value);
  std::memcpy(to, padded, count * sizeof(T));
}

// The value as storage type T holds it.
template <int kBytes, typename T, typename V>
SVF_FAST_INLINE V rounded(const V& value) {
  if constexpr (std::is_same_v<T, accumulator_t<T>>) {
    return value;
  } else {
    T stored[kBytes / sizeof(accumulator_t<T>)];
    Memory<kBytes>::store(stored, value);
    return Memory<kBytes>::load(stored);
  }
}

// Sums of products in double, one per lane. In halves: compilers split wider conversions badly.
template <typename Acc, int kBytes>
class DoubleSums {
  using Half = Vector<float, kBytes / 2>;
  using Wide = Vector<double, kBytes>;

 public:
  static constexpr int64_t lanes = kBytes / sizeof(float);

  SVF_FAST_INLINE void load(const double* from) {
    low_ = Memory<kBytes>::load(from);
    high_ = Memory<kBytes>::load(from + lanes / 2);
  }
  SVF_FAST_INLINE void store(double* to) const {
    Memory<kBytes>::store(to, low_);
    Memory<kBytes>::store(to + lanes / 2, high_);
  }
  SVF_FAST_INLINE void add(const Vector<float, kBytes>& x, const Vector<float, kBytes>& y) {
    low_ += half(x, 0) * half(y, 0);
    high_ += half(x, kBytes / 2) * half(y, kBytes / 2);
  }
  SVF_FAST_INLINE double sum() const { return sum_lanes<double, kBytes>(low_ + high_); }

 private:
  static SVF_FAST_INLINE Wide half(const Vector<float, kBytes>& x, int offset) {
    Half part;
    std::memcpy(&part, reinterpret_cast<const char*>(&x) + offset, kBytes / 2);
    return __builtin_convertvector(part, Wide);
  }

  Wide low_{};
  Wide high_{};
};

template <int kBytes>
class DoubleSums<double, kBytes> {
  using V = Vector<double, kBytes>;

 public:
  SVF_FAST_INLINE void load(const double* from) { sums_ = Memory<kBytes>::load(from); }
  SVF_FAST_INLINE void store(double* to) const { Memory<kBytes>::store(to, sums_); }
  SVF_FAST_INLINE void add(const V& x, const V& y) { sums_ += x * y; }
  SVF_FAST_INLINE double sum() const { return sum_lanes<double, kBytes>(sums_); }

 private:
  V sums_{};
};

}  // namespace svf_fast
