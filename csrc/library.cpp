// Schemas of every op. Kernels register themselves beside their definitions, one library per
// dispatch key.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(svf_fast, library) {
  library.def("channel_dot(Tensor a, Tensor b) -> Tensor");
  library.def("channel_dot_scale_(Tensor(a!) a, Tensor v, Tensor s) -> Tensor");
}
