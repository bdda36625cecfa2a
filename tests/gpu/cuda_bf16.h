// A stand-in for the header of the same name: see cuda_runtime.h here.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return c10::BFloat16(x.bits, c10::BFloat16::from_bits());
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {c10::BFloat16(x).x}; }
