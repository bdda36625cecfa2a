// Rows between storage and accumulation type, whole vectors at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector.h"

namespace svf_fast {

// Calls body(offset, vector, count) for each vector of `row`; the last one may be part zeros.
template <int kBytes, typename T, typename Body>
SVF_FAST_INLINE void for_vectors(const T* row, int64_t count, const Body& body) {
  constexpr int64_t lanes = kBytes / sizeof(accumulator_t<T>);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    body(i, Memory<kBytes>::load(row + i), lanes);
  }
  if (i < count) {
    T padded[lanes] = {};
    std::memcpy(padded, row + i, (count - i) * sizeof(T));
    body(i, Memory<kBytes>::load(padded), count - i);
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

}  // namespace svf_fast
