// svf_fast._C: what is known only to the build or to the compiled code, and what the host asks so
// often that Python would be slow at it. Tensors come as addresses.
#include <cstring>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <build_facts.h>

#include "cpu/guarded.h"
#include "cpu/isa.h"
#include "cpu/packed_product.h"

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
        facts["matrix_products"] = svf_fast::multiplies_packed() ? "packed" : "BLAS";
        facts["cuda_built"] = static_cast<bool>(SVF_FAST_CUDA_BUILT);
        facts["cuda_decision"] = SVF_FAST_CUDA_DECISION;
        facts["cuda_arch_list"] = SVF_FAST_CUDA_ARCH_LIST;
        facts["sources"] = SVF_FAST_SOURCES;
        return facts;
      },
      "Facts fixed when the package was built, and the instruction set chosen on this machine.");
  module.def(
      "guarded_directions",
      [](uintptr_t S, bool is_double, int64_t groups, int64_t rank, double limit,
         int64_t multiple) {
        return is_double ? svf_fast::guarded_directions(reinterpret_cast<const double*>(S), groups,
                                                        rank, limit, multiple)
                         : svf_fast::guarded_directions(reinterpret_cast<const float*>(S), groups,
                                                        rank, limit, multiple);
      },
      "Of float or double [groups * rank] at an address: svf_fast.svd.guarded_directions.");
  module.def(
      "same_bytes",
      [](const py::list& memory) {
        for (const auto& item : memory) {
          const auto entry = py::reinterpret_borrow<py::tuple>(item);
          const auto* a = reinterpret_cast<const void*>(entry[0].cast<uintptr_t>());
          const auto* b = reinterpret_cast<const void*>(entry[1].cast<uintptr_t>());
          if (std::memcmp(a, b, entry[2].cast<size_t>()) != 0) {
            return false;
          }
        }
        return true;
      },
      "Whether all (address, address, bytes) hold the same.");
}
