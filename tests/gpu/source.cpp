// One CUDA source (SOURCE) compiled as C++, its ops registered for CPU tensors: loaded after
// svf_fast._C they take the place of the CPU kernels in that process.
#include "../../csrc/cuda/launch.h"

#include <torch/csrc/stable/library.h>

#define CUDA CPU  // the dispatch key in STABLE_TORCH_LIBRARY_IMPL

#include SOURCE
