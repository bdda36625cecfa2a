// A stand-in for the header of the same name: see cuda_runtime.h here.
#pragma once

#include <torch/headeronly/util/Half.h>

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return c10::Half(x.bits, c10::Half::from_bits()); }
inline __half __float2half_rn(float x) { return {c10::Half(x).x}; }
