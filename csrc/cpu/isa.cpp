#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace svf_fast {
namespace {

Isa supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (avx2) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

Isa requested() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  if (capability == nullptr) {
    return Isa::kAvx512;
  }
  if (std::strcmp(capability, "default") == 0) {
    return Isa::kBaseline;
  }
  return std::strcmp(capability, "avx2") == 0 ? Isa::kAvx2 : Isa::kAvx512;
}

}  // namespace

Isa isa() {
  static const Isa chosen = supported() < requested() ? supported() : requested();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
#if defined(__x86_64__)
      return "sse2";
#elif defined(__aarch64__)
      return "neon";
#else
      return "baseline";
#endif
  }
}

}  // namespace svf_fast
