// Kernels with one fault each, named on the command line: the emulation must see it.
#include "cuda_runtime.h"

#include <cstdio>
#include <exception>
#include <memory>
#include <string>

constexpr int kThreads = 64;

// Each thread takes the number of another: to the right if `step` is positive.
__global__ void exchange_kernel(int* out, int step, bool barrier) {
  __shared__ int shared[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = thread + 1000 * static_cast<int>(blockIdx.x);
  if (barrier) {
    __syncthreads();
  }
  out[blockIdx.x * kThreads + thread] = shared[(thread + step + kThreads) % kThreads];
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  }
}

__global__ void part_of_a_warp_kernel() {
  if (threadIdx.x < 40) {
    __shfl_xor_sync(0xffffffffu, 1, 1);
  }
}

__global__ void read_kernel(float* values, int count) { values[0] = values[threadIdx.x + count]; }

__global__ void misaligned_kernel(float* values) {
  auto* vector = reinterpret_cast<uint4*>(values + 1);
  vector->x = 1;
}

template <typename... Arguments>
void launch(unsigned blocks, unsigned threads, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  if (cudaLaunchKernelEx(&config, arguments...) != cudaSuccess) {
    std::puts("invalid launch");
  }
}

// Whether all threads of four blocks got the number of their neighbour.
void exchange(int step, bool barrier) {
  int out[4 * kThreads];
  launch(4, kThreads, exchange_kernel, static_cast<int*>(out), step, barrier);
  bool right = true;
  for (int i = 0; i < 4 * kThreads; ++i) {
    right = right && out[i] == (i + step + kThreads) % kThreads + 1000 * (i / kThreads);
  }
  std::puts(right ? "right" : "wrong");
}

int main(int, char** arguments) {
  const std::string fault = arguments[1];
  const auto values = std::make_unique<float[]>(10);
  try {
    if (fault == "none") {
      exchange(1, true);
      exchange(-1, true);
    } else if (fault == "missing barrier, right") {
      exchange(1, false);
    } else if (fault == "missing barrier, left") {
      exchange(-1, false);
    } else if (fault == "divergent barrier") {
      launch(1, kThreads, divergent_kernel);
    } else if (fault == "part of a warp") {
      launch(1, kThreads, part_of_a_warp_kernel);
    } else if (fault == "read behind the end") {
      launch(1, 2, read_kernel, values.get(), 9);
    } else if (fault == "misaligned vector") {
      launch(1, 1, misaligned_kernel, values.get());
    } else if (fault == "no blocks") {
      launch(0, kThreads, divergent_kernel);
    }
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
