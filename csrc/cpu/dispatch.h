// From run time to compile time: the dtype of a tensor, the instruction set of this machine.
#pragma once

#include "../maps.h"
#include "isa.h"
#include "vector.h"

namespace svf_fast {

template <typename Kernel, typename... Arguments>
void run_baseline(const Arguments&... arguments) {
  Kernel::template run<16>(arguments...);
}

#if defined(__x86_64__)
template <typename Kernel, typename... Arguments>
SVF_FAST_AVX2 void run_avx2(const Arguments&... arguments) {
  Kernel::template run<32>(arguments...);
}

template <typename Kernel, typename... Arguments>
SVF_FAST_AVX512 void run_avx512(const Arguments&... arguments) {
  Kernel::template run<64>(arguments...);
}
#endif

// Runs a kernel in the widest instruction set there is. A kernel is a struct with a static
// always-inline template `run<kBytes>(arguments...)`, instantiated once per vector width.
template <typename Kernel, typename... Arguments>
void run(const Arguments&... arguments) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) {
    return run_avx512<Kernel>(arguments...);
  }
  if (isa() == Isa::kAvx2) {
    return run_avx2<Kernel>(arguments...);
  }
#endif
  run_baseline<Kernel>(arguments...);
}

// Calls body with a value of the element type.
template <typename Body>
void with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      return body(Half{});
  }
}

}  // namespace svf_fast
