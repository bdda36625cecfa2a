// Runs the threads of a block as fibers: a thread goes on until it waits for others or ends.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 1 << 17;

enum class State { kNew, kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

struct Thread {
  State state = State::kNew;
  Fiber* fiber = nullptr;
  unsigned mask = 0;
  uint64_t value = 0;
};

struct Block {
  const std::function<void()>* kernel;
  std::vector<Thread> threads;
  std::vector<uint64_t> exchanged;  // of each thread, what it brought to its warp's last exchange
  bool reversed;
  int started = 0;
};

// Fibers outlive a block: one that ends its thread takes the next, and waits for a block to come.
std::deque<Fiber> fibers;
std::vector<Fiber*> idle;
ucontext_t scheduler;
Block* block;
Fiber* active;
int current;
int cursor;                  // how many threads have had their turn since the last release
std::exception_ptr failure;  // of the thread that ran last

void set_current(int thread) {
  current = thread;
  const unsigned plane = blockDim.x * blockDim.y, rest = thread % plane;
  threadIdx = {rest % blockDim.x, rest / blockDim.x, thread / plane};
  block->threads[thread].fiber = active;
}

int at(int step) {
  const int count = static_cast<int>(block->threads.size());
  return block->reversed ? count - 1 - step : step;
}

// The next thread that has not begun, or -1.
int take_new() {
  const int count = static_cast<int>(block->threads.size());
  return block->started < count ? at(block->started++) : -1;
}

void fiber_main() {
  while (true) {
    try {
      (*block->kernel)();
    } catch (...) {
      failure = std::current_exception();
      swapcontext(&active->context, &scheduler);
    }
    block->threads[current].state = State::kDone;
    const int next = take_new();
    if (next >= 0) {
      set_current(next);
    } else {
      idle.push_back(active);
      swapcontext(&active->context, &scheduler);
    }
  }
}

// The next thread that can go on, or -1.
int take_ready() {
  const int count = static_cast<int>(block->threads.size());
  while (cursor < count) {
    const int thread = at(cursor++);
    if (block->threads[thread].state == State::kReady) {
      return thread;
    }
  }
  return -1;
}

void wait(State state) {
  block->threads[current].state = state;
  Fiber* const own = active;
  const int next = take_ready();
  if (next >= 0) {
    active = block->threads[next].fiber;
    set_current(next);
  }
  swapcontext(&own->context, next >= 0 ? &active->context : &scheduler);
}

// Waits for all lanes of the mask; what they bring.
const uint64_t* meet_warp(unsigned mask, uint64_t value) {
  Thread& thread = block->threads[current];
  const int lane = current % kWarp;
  if (!(mask >> lane & 1)) {
    throw std::runtime_error("a lane calls a warp function that its mask leaves out");
  }
  thread.mask = mask;
  thread.value = value;
  const int first = current - lane;
  wait(State::kInWarp);
  return &block->exchanged[first];
}

void resume(int thread, Fiber* fiber) {
  active = fiber;
  set_current(thread);
  swapcontext(&scheduler, &fiber->context);
  if (failure) {
    idle.clear();  // the other threads of the block are never resumed: their stacks are lost
    std::rethrow_exception(std::exchange(failure, nullptr));
  }
}

void start_threads() {
  for (int thread = take_new(); thread >= 0; thread = take_new()) {
    if (idle.empty()) {
      Fiber& fiber = fibers.emplace_back();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.context, fiber_main, 0);
      idle.push_back(&fiber);
    }
    Fiber* fiber = idle.back();
    idle.pop_back();
    resume(thread, fiber);
  }
}

// Frees the lanes of a warp if all that it waits for are there.
bool release_warp(int first, int end) {
  bool released = false;
  for (int thread = first; thread < end; ++thread) {
    const unsigned mask = block->threads[thread].mask;
    if (block->threads[thread].state != State::kInWarp) {
      continue;
    }
    bool complete = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1) {
        complete = complete && first + lane < end &&
                   block->threads[first + lane].state == State::kInWarp &&
                   block->threads[first + lane].mask == mask;
      }
    }
    for (int lane = 0; complete && lane < kWarp; ++lane) {
      if (mask >> lane & 1) {
        block->threads[first + lane].state = State::kReady;
        block->exchanged[first + lane] = block->threads[first + lane].value;
      }
    }
    released = released || complete;
  }
  return released;
}

bool release_barrier() {
  for (const Thread& thread : block->threads) {
    if (thread.state != State::kAtBarrier) {
      return false;
    }
  }
  for (Thread& thread : block->threads) {
    thread.state = State::kReady;
  }
  block->reversed = !block->reversed;
  return true;
}

[[noreturn]] void fail() {
  int counts[5] = {};
  for (const Thread& thread : block->threads) {
    ++counts[static_cast<int>(thread.state)];
  }
  idle.clear();
  throw std::runtime_error(
      "divergent barrier: of a block's threads " +
      std::to_string(counts[static_cast<int>(State::kAtBarrier)]) + " wait in __syncthreads, " +
      std::to_string(counts[static_cast<int>(State::kInWarp)]) + " for lanes of their warp, and " +
      std::to_string(counts[static_cast<int>(State::kDone)]) + " have ended");
}

void run_block() {
  const int count = static_cast<int>(block->threads.size());
  cursor = count;
  start_threads();
  while (true) {
    bool all_done = true, released = false;
    for (const Thread& thread : block->threads) {
      all_done = all_done && thread.state == State::kDone;
    }
    if (all_done) {
      return;
    }
    for (int first = 0; first < count; first += kWarp) {
      released = release_warp(first, std::min(first + kWarp, count)) || released;
    }
    if (!released && !release_barrier()) {
      fail();
    }
    cursor = 0;
    for (int thread = take_ready(); thread >= 0; thread = take_ready()) {
      resume(thread, block->threads[thread].fiber);
    }
  }
}

}  // namespace

int lane() { return current % kWarp; }

void wait_for_block() { wait(State::kAtBarrier); }

uint64_t exchange(unsigned mask, uint64_t value, int source) {
  const uint64_t* brought = meet_warp(mask, value);
  return mask >> source & 1 ? brought[source] : value;
}

unsigned ballot(unsigned mask, bool vote) {
  const uint64_t* votes = meet_warp(mask, vote);
  unsigned bits = 0;
  for (int source = 0; source < kWarp; ++source) {
    bits |= mask >> source & 1 ? static_cast<unsigned>(votes[source]) << source : 0;
  }
  return bits;
}

cudaError_t run(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  static unsigned launches = 0;
  const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
  if (count == 0 || count > 1024 || threads.z > 64 || grid.x == 0 || grid.x > 0x7fffffffu ||
      grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  ++launches;
  gridDim = grid;
  blockDim = threads;
  Block state{&kernel, std::vector<Thread>(count), std::vector<uint64_t>(count), false};
  block = &state;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        state.threads.assign(count, Thread{});
        state.reversed = (launches + x) % 2 == 1;
        state.started = 0;
        run_block();
      }
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

// What the libraries of CUDA builds of torch have, and others have not. The linker binds to these.
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char* function, uint32_t,
                                        bool, char** message) {
  if (error != cudaSuccess) {
    const std::string text = std::string(function) + ": CUDA error " + std::to_string(error);
    *message = strdup(text.c_str());
  }
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }

}  // extern "C"
