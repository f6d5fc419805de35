// CUDA on a CPU, for tests: the threads of a block are fibers that run in turn, each up to its next barrier. A block
// must reach its barriers and shuffles with all of its threads, which CUDA asks for too.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static        // blocks run one after another

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef void* cudaStream_t;
inline int cudaGetLastError() { return 0; }

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t word = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &word, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {         // to nearest, ties to even
  uint32_t word;
  memcpy(&word, &f, 4);
  return {(uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}

static dim3 threadIdx, blockIdx, gridDim;

namespace emulated {
constexpr int MOST = 1024, STACK = 1 << 16;
static ucontext_t scheduler, fiber[MOST];
static bool done[MOST];
static float exchanged[MOST];
static std::function<void()> body;

inline void wait() { swapcontext(&fiber[threadIdx.x], &scheduler); }
inline void enter() {
  body();
  done[threadIdx.x] = true;
}
}  // namespace emulated

inline void __syncthreads() { emulated::wait(); }

inline float __shfl_xor_sync(unsigned, float value, int lane) {
  unsigned me = threadIdx.x;
  emulated::exchanged[me] = value;
  emulated::wait();
  float other = emulated::exchanged[me ^ lane];
  emulated::wait();
  return other;
}

inline void emulate(dim3 grid, unsigned threads, std::function<void()> body) {
  using namespace emulated;
  static std::vector<char> stacks((size_t)MOST * STACK);
  emulated::body = body;
  gridDim = grid;
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      blockIdx = dim3(x, y);
      for (unsigned t = 0; t < threads; t++) {
        done[t] = false;
        getcontext(&fiber[t]);
        fiber[t].uc_stack.ss_sp = &stacks[(size_t)t * STACK];
        fiber[t].uc_stack.ss_size = STACK;
        fiber[t].uc_link = &scheduler;
        makecontext(&fiber[t], enter, 0);
      }
      for (unsigned left = threads; left;) {
        left = 0;
        for (unsigned t = 0; t < threads; t++)
          if (!done[t]) {
            threadIdx.x = t;
            swapcontext(&scheduler, &fiber[t]);
            left += !done[t];
          }
      }
    }
}

#define LAUNCH(kernel, n, ...) emulate(blocks<D>(n, heads), THREADS, [=] { kernel(__VA_ARGS__); })
