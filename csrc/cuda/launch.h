// What the CUDA kernels share: vector accesses, the accumulator's conversions, checked launches on
// the current stream of a tensor's device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <limits>
#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../accumulator.h"
#include "../maps.h"

namespace svf_fast {

constexpr int kWarp = 32;
constexpr int kAccess = 16;  // bytes of a vector access

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(double& to, double x) { to = x; }
__device__ inline void narrow(float& to, float x) { to = x; }
__device__ inline void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(__half& to, float x) { to = __float2half_rn(x); }

// kSize elements read or written at once, 16 bytes at most by one access.
template <typename T, int kSize>
struct alignas(kSize * sizeof(T) < kAccess ? kSize * sizeof(T) : kAccess) Pack {
  T values[kSize];
};

template <int kSize, typename T>
__device__ Pack<T, kSize> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kSize>*>(from);
}

template <int kSize, typename T>
__device__ void store(T* to, const Pack<T, kSize>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(pack) == kAccess) {  // nvcc 13 makes four stores of most assignments
    uint4 bits;
    memcpy(&bits, &pack, kAccess);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y),
                 "r"(bits.z), "r"(bits.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, kSize>*>(to) = pack;
}

template <typename... Pointers>
bool are_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kAccess == 0) && ...);
}

// The current stream of the device of a tensor, which is the current device while this lives.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const {
    int device = 0, count = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads,
              Arguments&&... arguments) const {
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "maps too large for a launch");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Calls body with a value of the element type.
template <typename Body>
void with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(__half{});
  }
}

}  // namespace svf_fast
