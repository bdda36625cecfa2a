// Instruction sets chosen at run time. A kernel body is an always-inline template over the vector
// width in bytes; functions marked with a target below instantiate it, and isa() picks among them.
#pragma once

namespace svf_fast {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this machine, lowered by torch's ATEN_CPU_CAPABILITY
// (default, avx2, avx512).
Isa isa();

const char* isa_name(Isa isa);

}  // namespace svf_fast

#define SVF_FAST_INLINE inline __attribute__((always_inline))
#define SVF_FAST_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__)
#define SVF_FAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#define SVF_FAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#endif
