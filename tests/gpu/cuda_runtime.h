// A stand-in for the header of the same name: CUDA kernels as plain C++, for tests without a GPU.
// The threads of a block are fibers of one CPU thread; blocks run one after another. Barriers that
// not all threads reach are errors. The order of the threads is turned round from block to block
// and from barrier to barrier: where a barrier is missing, a wrong result shows in one of the two.
// Not modelled: warps in lockstep, memory spaces, races between blocks.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // holds what the block before left there

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A small device, so that small maps already take a kernel several rounds.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}

namespace emulation {

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& thread);
void wait_for_block();
// What the lane `source` of this warp brings, once all lanes of the mask have called this.
uint64_t exchange(unsigned mask, uint64_t value, int source);
unsigned ballot(unsigned mask, bool vote);
int lane();

template <typename T>
T exchange_as(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return [&](Parameters... values) {
    return emulation::run(config->gridDim, config->blockDim, [&] { kernel(values...); });
  }(std::forward<Arguments>(arguments)...);
}

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::exchange(mask, 0, emulation::lane()); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::exchange_as(mask, value, source % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::exchange_as(mask, value, emulation::lane() ^ lanes);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int source = emulation::lane() + static_cast<int>(delta);
  return emulation::exchange_as(mask, value, source < 32 ? source : emulation::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::ballot(mask, predicate != 0);
}
