// svf_fast._C: what is known only to the build or to the compiled code.
#include <pybind11/pybind11.h>

#include <build_facts.h>

#include "cpu/isa.h"

namespace py = pybind11;

#define SVF_FAST_TEXT_OF(x) #x
#define SVF_FAST_TEXT(x) SVF_FAST_TEXT_OF(x)
#if defined(__clang__)
#define SVF_FAST_COMPILER "clang " SVF_FAST_TEXT(__clang_major__) "." SVF_FAST_TEXT(__clang_minor__)
#else
#define SVF_FAST_COMPILER "gcc " __VERSION__
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled CPU ops of svf_fast, registered with torch when this is imported.";
  module.def(
      "build_facts",
      [] {
        py::dict facts;
        facts["compiler"] = SVF_FAST_COMPILER;
        facts["torch_built_against"] = SVF_FAST_TORCH;
        facts["instruction_set"] = svf_fast::isa_name(svf_fast::isa());
        facts["cuda_built"] = static_cast<bool>(SVF_FAST_CUDA_BUILT);
        facts["cuda_decision"] = SVF_FAST_CUDA_DECISION;
        facts["cuda_arch_list"] = SVF_FAST_CUDA_ARCH_LIST;
        return facts;
      },
      "Facts fixed when the package was built, and the instruction set chosen on this machine.");
}
