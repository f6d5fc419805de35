// CUDA on a CPU, for tests: the threads of a block are fibers; each runs until it waits for others.
// The functions of hopper.cuh have here the meaning of their instructions in the PTX ISA: where
// copies and products put and find every element in shared memory, how threads hold accumulators
// and operands, what barriers count. The spelling of the instructions is checked by ptxas, and by
// descriptors.cu on a GPU.
//
// The order is as late and as mixed as a device allows, by chance, and the same in every run:
// threads run in a new order every round; some warps sleep for a while; a copy fills its target
// with NaNs at once and lands rounds later, or when nothing else goes on; a product is carried out
// when it is waited for, and its operands must not have changed since its issue. A broken rule ends
// the launch: one line on stderr, and an error from cudaGetLastError.
#pragma once
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static        // blocks run one after another

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef void* cudaStream_t;

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
static bool done[MOST], running, failed;
static float exchanged[MOST];
static unsigned threads;
static long changes, rounds;                         // changes of anything that a thread waits for
static std::mt19937 chance;
static std::function<void()> body;
constexpr unsigned START = 16;                           // dynamic memory begins where no box may
static unsigned end;                                     // and ends here
alignas(1024) static uint8_t shared[232448 + START];     // all that a block can have

inline void yield() { swapcontext(&fiber[threadIdx.x], &scheduler); }
inline void fail(const char* what) {                     // does not return to a thread
  if (!failed)
    fprintf(stderr, "emulated kernel: %s: thread %u of block %u, %u\n", what, threadIdx.x,
            blockIdx.x, blockIdx.y);
  failed = true;
  if (running) yield();
}

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

struct Box {                                             // on its way to shared memory
  long due;
  const __nv_bfloat16* x;
  int n, heads, d, rows, column, head, row;
  uint32_t to;
  uint64_t* barrier;
};
static std::vector<Box> boxes;
inline void land(const Box& box);

// A product is carried out when it is waited for: a read before that finds the old values.
struct Product {
  float* d;
  int n;
  bool b_mn, add;
  const uint32_t* registers;
  uint64_t a, b;
  uint32_t held[4], sum;
};
static std::vector<Product> open[MOST];
static std::vector<std::vector<Product>> groups[MOST];
static bool fenced[MOST], barriers_fenced;

struct Barrier { uint16_t phase, left, arrivals; int16_t kilobytes; };   // 8 bytes, as an mbarrier
static std::vector<Barrier*> barriers;

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

inline int cudaGetLastError() {
  bool code = emulated::failed;
  emulated::failed = false;
  return code;
}

// One block of threads from its first to its last.
inline void emulate_block() {
  using namespace emulated;
  static std::vector<char> stacks((size_t)MOST * STACK);
  memset(shared, 0xff, sizeof shared);                   // what nobody wrote is no number
  block = Meeting();
  std::fill(warp, std::end(warp), Meeting());
  std::fill(warpgroup, std::end(warpgroup), Meeting());
  boxes.clear();
  barriers.clear();
  std::vector<unsigned> order;
  for (unsigned t = 0; t < threads; t++) {
    order.push_back(t);
    done[t] = fenced[t] = false;
    open[t].clear();
    groups[t].clear();
    getcontext(&fiber[t]);
    fiber[t].uc_stack.ss_sp = &stacks[(size_t)t * STACK];
    fiber[t].uc_stack.ss_size = STACK;
    fiber[t].uc_link = &scheduler;
    makecontext(&fiber[t], enter, 0);
  }
  uint32_t asleep = 0;                                   // a bit per warp
  for (long idle = 0; !order.empty(); rounds++) {
    long before = changes;
    std::shuffle(boxes.begin(), boxes.end(), chance);
    for (size_t i = 0; i < boxes.size();)
      if (boxes[i].due <= rounds || idle > 2) {
        land(boxes[i]);
        boxes.erase(boxes.begin() + i);
        idle = 0;
      } else {
        i++;
      }
    std::shuffle(order.begin(), order.end(), chance);
    if (chance() % 8 == 0) asleep = chance() & chance();
    for (unsigned t : order)
      if (!(asleep >> t / 32 & 1)) {
        threadIdx.x = t;
        running = true;
        swapcontext(&scheduler, &fiber[t]);
        running = false;
        changes += done[t];
        if (failed) return;
      }
    auto is_done = [](unsigned t) { return done[t]; };
    order.erase(std::remove_if(order.begin(), order.end(), is_done), order.end());
    idle = changes == before ? idle + 1 : 0;
    if (idle > 255) return fail("deadlock");             // all wait, for nothing
  }
  if (!boxes.empty()) fail("a copy that nobody waited for");
  for (Barrier* b : barriers)
    if (b->left != b->arrivals || b->kilobytes) fail("a barrier left in the middle of a phase");
  for (unsigned t = 0; t < threads; t++)
    if (!open[t].empty() || !groups[t].empty()) fail("a product that nobody waited for");
}

inline void emulate(dim3 grid, unsigned threads, unsigned bytes, std::function<void()> body) {
  emulated::body = body;
  emulated::threads = threads;
  emulated::end = emulated::START + bytes;
  emulated::chance.seed(0);
  gridDim = grid;
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x && !emulated::failed; x++) {
      blockIdx = dim3(x, y);
      emulate_block();
    }
}

#define LAUNCH(kernel, grid, bytes, ...) emulate(grid, THREADS, bytes, [=] { kernel(__VA_ARGS__); })

// ---- Hopper: the functions of hopper.cuh ------------------------------------------------------

typedef __nv_bfloat16 bf16;
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) uint8_t* name = emulated::shared + emulated::START

namespace emulated {

inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }
inline bf16 element(uint32_t at) {                       // at an address before the swizzle
  if (at + 2 > end) fail("an operand outside of shared memory");
  bf16 x;
  memcpy(&x, shared + swizzled(at), 2);
  return x;
}

inline Barrier& of(uint64_t* b) {
  Barrier& barrier = *reinterpret_cast<Barrier*>(b);
  if ((uint8_t*)(b + 1) > shared + end) fail("a barrier outside of shared memory");
  if (barrier.arrivals == 0xffff) fail("a barrier that nobody initialised");
  return barrier;
}
inline void turn(Barrier& b) {
  changes++;
  if (!b.left && !b.kilobytes) b.phase ^= 1, b.left = b.arrivals;
}
}  // namespace emulated

inline uint32_t address(const void* p) { return (uint32_t)((const uint8_t*)p - emulated::shared); }

inline void barrier_init(uint64_t* b, int arrivals) {
  *reinterpret_cast<emulated::Barrier*>(b) = {0, (uint16_t)arrivals, (uint16_t)arrivals, 0};
  emulated::barriers.push_back(reinterpret_cast<emulated::Barrier*>(b));
  emulated::barriers_fenced = false;
}
inline void barrier_fence() { emulated::barriers_fenced = true; }
inline void barrier_arrive(uint64_t* b) {
  if (!emulated::of(b).left--) emulated::fail("one arrival too many");
  emulated::turn(emulated::of(b));
}
inline void barrier_expect(uint64_t* b, int bytes) {
  if (bytes % 1024) emulated::fail("a barrier of the emulation counts whole kilobytes");
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
  using namespace emulated;
  uint32_t start = address(to);
  if (start % 1024 || start + map->rows * 128 > end) fail("a box where none may lie");
  if (!barriers_fenced) fail("a copy whose barrier it may not see");
  memset(shared + start, 0xff, map->rows * 128);
  long due = chance() % 2 ? rounds + 1 + (long)(chance() % 16) : LONG_MAX;
  boxes.push_back(
      {due, map->x, map->n, map->heads, map->d, map->rows, column, head, row, start, b});
}
inline void emulated::land(const Box& box) {
  for (int r = 0; r < box.rows; r++)
    for (int c = 0; c < 64; c++) {
      bf16 x = {0};
      long at = ((long)(box.row + r) * box.heads + box.head) * box.d + box.column + c;
      if (box.row + r < box.n) x = box.x[at];
      memcpy(shared + swizzled(box.to + r * 128 + c * 2), &x, 2);
    }
  of(box.barrier).kilobytes -= box.rows * 128 / 1024;
  turn(of(box.barrier));
}

inline uint64_t descriptor(const void* start, int stride) {
  if (address(start) % 16) emulated::fail("a descriptor between two pieces of 16 bytes");
  return address(start) | (uint64_t)stride << 32;
}

inline void wgmma_fence() { emulated::fenced[threadIdx.x] = true; }
inline void wgmma_commit() {
  emulated::groups[threadIdx.x].push_back(emulated::open[threadIdx.x]);
  emulated::open[threadIdx.x].clear();
}

namespace emulated {
inline uint32_t k_major(uint64_t x, unsigned row, unsigned k) {
  return (uint32_t)x + row / 8 * 1024 + row % 8 * 128 + k * 2;
}
inline uint32_t mn_major(uint64_t x, unsigned k, unsigned column) {
  uint32_t box = (uint32_t)x + column / 64 * (uint32_t)(x >> 32);
  return box + k / 8 * 1024 + k % 8 * 128 + column % 64 * 2;
}
inline bf16 element_of_b(const Product& p, unsigned k, unsigned column) {
  return element(p.b_mn ? mn_major(p.b, k, column) : k_major(p.b, column, k));
}
inline uint32_t sum(const Product& p) {                  // of all that it reads in shared memory
  uint32_t sum = 0;
  for (unsigned k = 0; k < 16; k++) {
    for (unsigned row = 0; row < 64 && !p.registers; row++)
      sum = sum * 31 + element(k_major(p.a, row, k)).bits;
    for (int c = 0; c < p.n; c++) sum = sum * 31 + element_of_b(p, k, c).bits;
  }
  return sum;
}
inline void issue(Product p) {
  if (!fenced[threadIdx.x]) fail("a product without a fence behind the last wait");
  if (p.registers) memcpy(p.held, p.registers, sizeof p.held);
  if (threadIdx.x % 128 == 0) p.sum = sum(p);            // one looks for all
  open[threadIdx.x].push_back(p);
}

inline void carry_out(const Product& p) {
  unsigned me = threadIdx.x % 128, lane = me % 32, first = threadIdx.x / 4 * 4;
  if (me == 0 && p.sum != sum(p)) fail("shared memory changed under a product");
  if (p.registers && memcmp(p.held, p.registers, sizeof p.held))
    fail("registers changed under a product");
  for (int r = 0; r < 2; r++) {
    unsigned row = me / 32 * 16 + lane / 4 + 8 * r;
    float a[16];
    for (int k = 0; k < 16; k++)
      if (p.registers) {                                 // of the lane that holds this column
        size_t number = &p - groups[threadIdx.x].front().data();
        const Product& theirs = groups[first + k % 8 / 2].front()[number];
        uint32_t word = theirs.held[k / 8 * 2 + r];
        a[k] = __bfloat162float({(uint16_t)(k % 2 ? word >> 16 : word)});
      } else {
        a[k] = __bfloat162float(element(k_major(p.a, row, k)));
      }
    for (int i = 0; i < p.n / 8; i++)
      for (int c = 0; c < 2; c++) {
        unsigned column = 8 * i + lane % 4 * 2 + c;
        float sum = p.add ? p.d[4 * i + 2 * r + c] : 0.f;
        for (int k = 0; k < 16; k++)
          sum += a[k] * __bfloat162float(element_of_b(p, k, column));
        p.d[4 * i + 2 * r + c] = sum;
      }
  }
}
}  // namespace emulated

template <int LEFT> inline void wgmma_wait() {
  using namespace emulated;
  unsigned me = threadIdx.x;
  fenced[me] = false;
  while (groups[me].size() > LEFT) {
    warpgroup[me / 128].meet(128);                       // all have issued it
    for (const Product& p : groups[me].front()) carry_out(p);
    warpgroup[me / 128].meet(128);                       // all have read the others' registers
    groups[me].erase(groups[me].begin());
  }
}
template <int N> inline void wait_registers(float (&)[N]) {}
template <int N> inline void more_registers() {}
template <int N> inline void less_registers() {}

template <int N, bool B_MN> inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
  emulated::issue({d, N, B_MN, add != 0, nullptr, a, b});
}
template <int N, bool B_MN>
inline void wgmma(float (&d)[N / 2], const uint32_t* a, uint64_t b, int add) {
  emulated::issue({d, N, B_MN, add != 0, a, 0, b});
}

inline uint32_t pack(float low, float high) {
  return (uint32_t)__float2bfloat16(low).bits | (uint32_t)__float2bfloat16(high).bits << 16;
}
inline float exp2_fast(float x) { return exp2f(x); }
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class F> int cudaFuncSetAttribute(F, int, int bytes) { return bytes > 232448; }
