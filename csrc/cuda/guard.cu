// guards_hold on CUDA: a block a layer, which has a few thousand singular values at most. Sums are
// in double, as in the definition.
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

__global__ void __launch_bounds__(kThreads)
    guards_hold_kernel(const float* S, const bool* guarded, const int64_t* layers, bool* holds,
                       double limit) {
  layers += 2 * static_cast<int64_t>(blockIdx.x);
  const int64_t first = layers[0], groups = layers[1], rank = (layers[2] - first) / groups;
  S += first;
  guarded += first;
  double ratio = 0, others = 0;
  for (int64_t group = 0; group < groups; ++group, S += rank, guarded += rank) {
    double square = 0;
    for (int64_t r = threadIdx.x; r < rank; r += kThreads) {
      square += static_cast<double>(S[r]) * S[r];
    }
    const double mean = sum_block(square) / rank;
    for (int64_t r = threadIdx.x; r < rank; r += kThreads) {
      if (!guarded[r]) {
        ratio += mean / (static_cast<double>(S[r]) * S[r]);
        others += 1;
      }
    }
  }
  ratio = sum_block(ratio);
  others = sum_block(others);
  if (threadIdx.x == 0) {
    holds[blockIdx.x] = ratio <= others * (limit * limit);
  }
}

Tensor guards_hold(const Tensor& S, const Tensor& guarded, const Tensor& layers, double limit) {
  STD_TORCH_CHECK(S.scalar_type() == ScalarType::Float && S.is_contiguous() && S.dim() == 1,
                  "guards_hold: S must be a contiguous float32 [n]");
  STD_TORCH_CHECK(guarded.scalar_type() == ScalarType::Bool && guarded.is_contiguous() &&
                      guarded.dim() == 1 && guarded.size(0) == S.size(0) &&
                      guarded.device() == S.device(),
                  "guards_hold: guarded must be a contiguous bool [n] on the device of S");
  STD_TORCH_CHECK(layers.scalar_type() == ScalarType::Long && layers.is_contiguous() &&
                      layers.dim() == 2 && layers.size(0) > 0 && layers.size(1) == 2 &&
                      layers.device() == S.device(),
                  "guards_hold: layers must be a contiguous int64 [L + 1, 2] on the device of S");
  const int64_t count = layers.size(0) - 1;
  Tensor holds = torch::stable::new_empty(guarded, {&count, 1});
  if (count > 0) {
    const Stream stream(S);
    stream.launch(guards_hold_kernel, count, kThreads,
                  static_cast<const float*>(S.const_data_ptr()),
                  static_cast<const bool*>(guarded.const_data_ptr()),
                  static_cast<const int64_t*>(layers.const_data_ptr()),
                  static_cast<bool*>(holds.mutable_data_ptr()), limit);
  }
  return holds;
}

}  // namespace
}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CUDA, library) {
  library.impl("guards_hold", TORCH_BOX(&svf_fast::guards_hold));
}
