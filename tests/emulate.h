// CUDA on a CPU, for tests: the threads of a block are fibers that run in turn, each until it waits for others. Of
// Hopper's instructions it has the meaning, by the PTX ISA: where copies and products put and find every element in
// shared memory, how threads hold accumulators and operands, and what barriers count. Not whether hopper.cuh spells
// them right (ptxas says that, and a GPU), nor what a race between threads would do.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
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

struct float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::min;

static dim3 threadIdx, blockIdx, gridDim;

namespace emulated {
constexpr int MOST = 1024, STACK = 1 << 16;
static ucontext_t scheduler, fiber[MOST];
static bool done[MOST];
static float exchanged[MOST];
static unsigned threads;
static long changes;                                     // of anything that somebody may wait for
static std::function<void()> body;
alignas(1024) static uint8_t shared[232448];             // all that a block can have

inline void yield() { swapcontext(&fiber[threadIdx.x], &scheduler); }

// All of `size` threads meet here before any goes on.
struct Meeting {
  unsigned arrived = 0, round = 0;
  void meet(unsigned size) {
    unsigned mine = round;
    changes++;
    if (++arrived == size) arrived = 0, round++;
    while (round == mine) yield();
  }
};
static Meeting block, warp[MOST / 32], warpgroup[MOST / 128];

inline void enter() {
  body();
  done[threadIdx.x] = true;
}
}  // namespace emulated

inline void __syncthreads() { emulated::block.meet(emulated::threads); }

inline float __shfl_xor_sync(unsigned, float value, int lane) {
  unsigned me = threadIdx.x;
  emulated::exchanged[me] = value;
  emulated::warp[me / 32].meet(32);
  float other = emulated::exchanged[me ^ lane];
  emulated::warp[me / 32].meet(32);
  return other;
}

inline void emulate(dim3 grid, unsigned threads, std::function<void()> body) {
  using namespace emulated;
  static std::vector<char> stacks((size_t)MOST * STACK);
  emulated::body = body;
  emulated::threads = threads;
  gridDim = grid;
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      blockIdx = dim3(x, y);
      memset(shared, 0xff, sizeof shared);               // what nobody wrote is no number
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
        long before = changes++;
        for (unsigned t = 0; t < threads; t++)
          if (!done[t]) {
            threadIdx.x = t;
            swapcontext(&scheduler, &fiber[t]);
            left += !done[t];
            changes += done[t];
          }
        if (left && changes == before + 1) {             // all wait, for nothing
          fprintf(stderr, "emulated kernel: deadlock of %u threads in block %u, %u\n", left, x, y);
          abort();
        }
      }
    }
}

#define LAUNCH(kernel, grid, bytes, ...) emulate(grid, THREADS, [=] { kernel(__VA_ARGS__); })

// ---- Hopper: what hopper.cuh has, by the meaning of the instructions ---------------------------------------------------

typedef __nv_bfloat16 bf16;
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) uint8_t* name = emulated::shared

namespace emulated {

inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }
inline float element(uint32_t at) {                      // the bf16 at an address that the swizzle has yet to permute
  if (at + 2 > sizeof shared) abort();
  bf16 x;
  memcpy(&x, shared + swizzled(at), 2);
  return __bfloat162float(x);
}

struct Barrier { uint16_t phase, left, arrivals; int16_t kilobytes; };    // in the 8 bytes of an mbarrier
inline Barrier& of(uint64_t* b) { return *reinterpret_cast<Barrier*>(b); }
inline void turn(Barrier& b) {
  changes++;
  if (!b.left && !b.kilobytes) b.phase ^= 1, b.left = b.arrivals;
}

// A product waits, as on the device, until it is waited for: who reads its result before that reads nonsense.
struct Product { float* d; int n; bool b_mn, add, in_registers; uint64_t a, b; uint32_t registers[4]; };
static std::vector<Product> open[MOST];
static std::vector<std::vector<Product>> groups[MOST];
}  // namespace emulated

inline uint32_t address(const void* p) { return (uint32_t)((const uint8_t*)p - emulated::shared); }

inline void barrier_init(uint64_t* b, int arrivals) { emulated::of(b) = {0, (uint16_t)arrivals, (uint16_t)arrivals, 0}; }
inline void barrier_fence() {}
inline void barrier_arrive(uint64_t* b) {
  if (!emulated::of(b).left--) abort();                  // one arrival too many
  emulated::turn(emulated::of(b));
}
inline void barrier_expect(uint64_t* b, int bytes) {
  if (bytes % 1024) abort();
  emulated::of(b).kilobytes += bytes / 1024;
  barrier_arrive(b);
}
inline void barrier_wait(uint64_t* b, int parity) {
  while (emulated::of(b).phase == parity) emulated::yield();
}

struct CUtensorMap { const bf16* x; int n, heads, d, rows; };
inline int make_map(CUtensorMap* map, const bf16* x, int n, int heads, int d, int rows) {
  *map = {x, n, heads, d, rows};
  return 0;
}
inline void copy_box(void* to, const CUtensorMap* map, int column, int head, int row, uint64_t* b) {
  uint32_t start = address(to);
  if (start % 1024) abort();
  for (int r = 0; r < map->rows; r++)
    for (int c = 0; c < 64; c++) {
      bf16 zero = {0};
      const bf16* from = row + r < map->n ? map->x + ((long)(row + r) * map->heads + head) * map->d + column + c : &zero;
      memcpy(emulated::shared + emulated::swizzled(start + r * 128 + c * 2), from, 2);
    }
  emulated::of(b).kilobytes -= map->rows * 128 / 1024;
  emulated::turn(emulated::of(b));
}

inline uint64_t descriptor(const void* start, int stride) {
  if (address(start) % 16) abort();
  return address(start) | (uint64_t)stride << 32;
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  emulated::groups[threadIdx.x].push_back(emulated::open[threadIdx.x]);
  emulated::open[threadIdx.x].clear();
}

namespace emulated {
inline void carry_out(const Product& p) {
  unsigned me = threadIdx.x % 128, lane = me % 32, first = threadIdx.x / 4 * 4;
  for (int r = 0; r < 2; r++) {
    unsigned row = me / 32 * 16 + lane / 4 + 8 * r;
    float a[16];
    for (int k = 0; k < 16; k++)
      if (p.in_registers) {                              // of the lane that holds this column, at the same product
        const Product& theirs = groups[first + k % 8 / 2].front()[&p - groups[threadIdx.x].front().data()];
        uint32_t word = theirs.registers[k / 8 * 2 + r];
        a[k] = __bfloat162float({(uint16_t)(k % 2 ? word >> 16 : word)});
      } else {
        a[k] = element((uint32_t)p.a + row / 8 * 1024 + row % 8 * 128 + k * 2);
      }
    for (int i = 0; i < p.n / 8; i++)
      for (int c = 0; c < 2; c++) {
        unsigned column = 8 * i + lane % 4 * 2 + c;
        float sum = p.add ? p.d[4 * i + 2 * r + c] : 0.f;
        for (int k = 0; k < 16; k++)
          sum += a[k] * element(p.b_mn ? (uint32_t)p.b + column / 64 * (uint32_t)(p.b >> 32) + k / 8 * 1024 +
                                             k % 8 * 128 + column % 64 * 2
                                       : (uint32_t)p.b + column / 8 * 1024 + column % 8 * 128 + k * 2);
        p.d[4 * i + 2 * r + c] = sum;
      }
  }
}
}  // namespace emulated

template <int LEFT> inline void wgmma_wait() {
  using namespace emulated;
  unsigned me = threadIdx.x;
  while (groups[me].size() > LEFT) {
    warpgroup[me / 128].meet(128);                       // all have issued it
    for (const Product& p : groups[me].front()) carry_out(p);
    warpgroup[me / 128].meet(128);                       // all have read the others' registers
    groups[me].erase(groups[me].begin());
  }
}
template <int N> inline void settled(float (&)[N]) {}
template <int N> inline void more_registers() {}
template <int N> inline void less_registers() {}

template <int N, bool B_MN> inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
  emulated::open[threadIdx.x].push_back({d, N, B_MN, add != 0, false, a, b, {}});
}
template <int N, bool B_MN> inline void wgmma(float (&d)[N / 2], const uint32_t* a, uint64_t b, int add) {
  emulated::open[threadIdx.x].push_back({d, N, B_MN, add != 0, true, 0, b, {a[0], a[1], a[2], a[3]}});
}

inline uint32_t pack(float low, float high) {
  return (uint32_t)__float2bfloat16(low).bits | (uint32_t)__float2bfloat16(high).bits << 16;
}
inline float exp2_fast(float x) { return exp2f(x); }
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class F> int cudaFuncSetAttribute(F, int, int bytes) { return bytes > (int)sizeof emulated::shared; }
