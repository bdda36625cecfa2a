// Vectors of kBytes bytes over the compilers' vector extensions, so that one kernel body serves
// every instruction set. 16-bit floats are widened on load and rounded to nearest even on store.
#pragma once

#include <cstdint>
#include <cstring>

#include "../accumulator.h"
#include "isa.h"

namespace svf_fast {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

template <typename To, typename From>
SVF_FAST_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Unaligned loads to and stores from vectors of the accumulation type.
template <int kBytes>
struct Memory {
  using Float = Vector<float, kBytes>;
  using Word = Vector<uint32_t, kBytes>;
  using Short = Vector<uint16_t, kBytes / 2>;

  static SVF_FAST_INLINE Float load(const float* from) {
    Float value;
    std::memcpy(&value, from, kBytes);
    return value;
  }

  static SVF_FAST_INLINE Vector<double, kBytes> load(const double* from) {
    Vector<double, kBytes> value;
    std::memcpy(&value, from, kBytes);
    return value;
  }

  static SVF_FAST_INLINE Float load(const BFloat16* from) {
    return bit_cast<Float>(load_words(from) << 16);
  }

  static SVF_FAST_INLINE Float load(const Half* from) {
    const Word bits = load_words(from);
    const Word magnitude = bits & 0x7fffu;
    // exponent rebias by 112; infinity and NaN by another 112
    const Word normal = (magnitude << 13) + (112u << 23);
    const Word special = normal + (112u << 23);
    // a subnormal m is m * 2^-24 = (0.5 + m * 2^-24) - 0.5, both terms exact
    const Float half = Float{} + 0.5f;
    const Word subnormal = bit_cast<Word>(bit_cast<Float>(magnitude | 0x3f000000u) - half);
    const Word finite = magnitude < 0x400u ? subnormal : normal;
    const Word value = magnitude < 0x7c00u ? finite : special;
    return bit_cast<Float>(value | ((bits & 0x8000u) << 16));
  }

  template <typename V, typename T>
  static SVF_FAST_INLINE void store_native(T* to, const V& value) {
    std::memcpy(to, &value, kBytes);
  }
  static SVF_FAST_INLINE void store(float* to, const Float& value) { store_native(to, value); }
  static SVF_FAST_INLINE void store(double* to, const Vector<double, kBytes>& value) {
    store_native(to, value);
  }

  static SVF_FAST_INLINE void store(BFloat16* to, const Float& value) {
    const Word bits = bit_cast<Word>(value);
    const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Word quiet = (bits >> 16) | 0x40u;
    store_words(to, (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }

  static SVF_FAST_INLINE void store(Half* to, const Float& value) {
    const Word bits = bit_cast<Word>(value);
    const Word magnitude = bits & 0x7fffffffu;
    const Word normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // adding 0.5 rounds to a multiple of 2^-24, the unit of subnormals
    const Float half = Float{} + 0.5f;
    const Word subnormal = bit_cast<Word>(bit_cast<Float>(magnitude) + half) - 0x3f000000u;
    const Word infinity = Word{} + 0x7c00u;
    const Word quiet = infinity | 0x200u | ((magnitude >> 13) & 0x3ffu);
    const Word finite = magnitude < 0x38800000u ? subnormal : normal;
    const Word special = magnitude > 0x7f800000u ? quiet : infinity;
    const Word rounded = magnitude < 0x47800000u ? finite : special;
    store_words(to, rounded | ((bits & 0x80000000u) >> 16));
  }

 private:
  template <typename T>
  static SVF_FAST_INLINE Word load_words(const T* from) {
    static_assert(sizeof(T) == 2);
    Short value;
    std::memcpy(&value, from, kBytes / 2);
    return __builtin_convertvector(value, Word);
  }

  template <typename T>
  static SVF_FAST_INLINE void store_words(T* to, const Word& words) {
    static_assert(sizeof(T) == 2);
    const Short value = __builtin_convertvector(words, Short);
    std::memcpy(to, &value, kBytes / 2);
  }
};

// Sum of the lanes, halving: the error grows with the logarithm of their number.
template <typename Acc, int kBytes>
SVF_FAST_INLINE Acc sum_lanes(const Vector<Acc, kBytes>& value) {
  constexpr int kLanes = kBytes / sizeof(Acc);
  Acc lanes[kLanes];
  std::memcpy(lanes, &value, kBytes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

}  // namespace svf_fast
