// guard_holds on CUDA: one block, because a layer has a few thousand singular values at most. Sums
// are in double, as in the definition.
#include <cstdint>

#include <torch/csrc/stable/library.h>

#include "launch.h"

namespace svf_fast {
namespace {

constexpr int kThreads = 256;

// The sum over the block, for all its threads.
__device__ double sum_block(double value) {
  __shared__ double values[kThreads];
  __syncthreads();  // those of an earlier sum have been read
  values[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      values[threadIdx.x] += values[threadIdx.x + half];
    }
  }
  __syncthreads();
  return values[0];
}

// Whether the ascending indices [count] hold `index`.
__device__ bool contains(const int64_t* indices, int64_t count, int64_t index) {
  int64_t first = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (indices[first + half] < index) {
      first += half + 1;
      count -= half + 1;
    } else if (indices[first + half] > index) {
      count = half;
    } else {
      return true;
    }
  }
  return false;
}

__global__ void __launch_bounds__(kThreads)
    guard_holds_kernel(const float* S, const int64_t* tail, bool* holds, int64_t groups,
                       int64_t rank, int64_t guarded, double limit) {
  double ratio = 0;
  for (int64_t group = 0; group < groups; ++group, S += rank, tail += guarded) {
    double square = 0;
    for (int64_t r = threadIdx.x; r < rank; r += kThreads) {
      square += static_cast<double>(S[r]) * S[r];
    }
    const double mean = sum_block(square) / rank;
    for (int64_t r = threadIdx.x; r < rank; r += kThreads) {
      if (!contains(tail, guarded, r)) {
        ratio += mean / (static_cast<double>(S[r]) * S[r]);
      }
    }
  }
  ratio = sum_block(ratio);
  if (threadIdx.x == 0) {
    *holds = ratio <= groups * (rank - guarded) * limit * limit;
  }
}

Tensor guard_holds(const Tensor& S, const std::optional<Tensor>& tail, int64_t groups,
                   double limit) {
  STD_TORCH_CHECK(S.scalar_type() == ScalarType::Float && S.is_contiguous() && S.dim() == 1,
                  "guard_holds: S must be a contiguous float32 [G * R]");
  STD_TORCH_CHECK(groups > 0 && S.size(0) % groups == 0,
                  "guard_holds: groups do not divide the values of S");
  STD_TORCH_CHECK(
      !tail || (tail->scalar_type() == ScalarType::Long && tail->is_contiguous() &&
                tail->dim() == 2 && tail->size(0) == groups && tail->device() == S.device()),
      "guard_holds: tail must be a contiguous int64 [G, T] on the device of S");
  Tensor holds = torch::stable::new_empty(S, {}, ScalarType::Bool);
  const Stream stream(S);
  stream.launch(guard_holds_kernel, 1, kThreads, static_cast<const float*>(S.const_data_ptr()),
                tail ? static_cast<const int64_t*>(tail->const_data_ptr()) : nullptr,
                static_cast<bool*>(holds.mutable_data_ptr()), groups, S.size(0) / groups,
                tail ? tail->size(1) : int64_t(0), limit);
  return holds;
}

}  // namespace
}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CUDA, library) {
  library.impl("guard_holds", TORCH_BOX(&svf_fast::guard_holds));
}
