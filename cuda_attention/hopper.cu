// v2: masked attention on Hopper's tensor cores (sm_90a). Tiles, bits and lse are those of tiles.py and blockwise.py.
//
// A block has one producer warpgroup, whose first thread copies tiles by TMA through a ring of two stages, and two
// consumer warpgroups, each with 64 of the 128 rows that stay: queries in forward and dq, keys in dkv. Scores and their
// gradients live in registers alone; every output is written once, by one block, so results are the same in every run.
#ifdef EMULATED                  // on a CPU, for tests: tests/emulate.h
#include "emulate.h"
#else
#include "hopper.cuh"
#endif

constexpr int TILE = 128, STAGES = 2, THREADS = 384;
struct Visits { const int *start, *other, *bits, *order; };

template <int D, int ROWS = TILE> using Tile = bf16[D / 64][ROWS][64];   // 64-column boxes

// Rows from `row` on; `full` is arrived at, and turns when they are there.
template <int D, int ROWS> __device__ inline void copy_tile(Tile<D, ROWS>& to, const CUtensorMap* x, int row, uint64_t* full) {
  barrier_expect(full, sizeof(to));
  for (int box = 0; box < D / 64; box++) copy_box(to[box], x, box * 64, blockIdx.y, row, full);
}

// s (64 x M) = rows 64 w .. of a times all M rows of b, transposed: both K-major.
template <int D, int M> __device__ inline void scores(float (&s)[M / 2], const Tile<D>& a, const Tile<D, M>& b, int w) {
  for (int k = 0; k < D / 16; k++)
    wgmma<M, false>(s, descriptor(&a[k / 4][64 * w][k % 4 * 16], 0), descriptor(&b[k / 4][0][k % 4 * 16], 0), k > 0);
}

// out (64 x D) += p (64 x M, in registers) times b (M x D).
template <int D, int M> __device__ inline void times(float (&out)[D / 2], const uint32_t (&p)[M / 4], const Tile<D, M>& b) {
  for (int k = 0; k < M / 16; k++) wgmma<D, true>(out, &p[4 * k], descriptor(&b[0][16 * k][0], sizeof(b[0])), 1);
}

// Accumulator elements 4 i + 2 r + c are row u + 8 r, column 8 i + 2 x + c: as operands, pairs of columns.
template <int M> __device__ inline void to_operand(uint32_t (&p)[M / 4], const float (&s)[M / 2]) {
  for (int i = 0; i < M / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// -inf where a partial tile hides; words: of this thread, those of M columns.
template <int M> __device__ inline void hide(float (&s)[M / 2], const uint32_t* words) {
  for (int i = 0; i < M / 2; i++)
    if (!(words[i / 32] >> i % 32 & 1)) s[i] = -INFINITY;
}

// Rows of this thread, r = 0, 1, of the outputs of a tile: (64 x D) accumulators of one warpgroup times a factor each.
template <int D> __device__ inline void write(bf16* to, const float (&out)[D / 2], float f0, float f1, int tile, int n) {
  int me = threadIdx.x % 128, row = tile * TILE + threadIdx.x / 128 * 64 + me / 32 * 16 + me % 32 / 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    uint32_t* at = reinterpret_cast<uint32_t*>(to + ((long)(row + 8 * r) * gridDim.y + blockIdx.y) * D) + me % 4;
    float f = r ? f1 : f0;
    if (row + 8 * r < n)
      for (int i = 0; i < D / 8; i++) at[4 * i] = pack(out[4 * i + 2 * r] * f, out[4 * i + 2 * r + 1] * f);
  }
}

template <class T> __device__ inline T& aligned(uint8_t* memory) {
  return *reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
}

__device__ inline float over_row(float x, bool maximum) {                // the four lanes that share a row
  for (int lane = 1; lane < 4; lane *= 2) {
    float other = __shfl_xor_sync(0xffffffff, x, lane);
    x = maximum ? fmaxf(x, other) : x + other;
  }
  return x;
}

// Online softmax of two rows: scores s to weights, top and total so far; what was summed before shrinks by `shrink`.
__device__ inline void soften(float (&s)[64], float (&top)[2], float (&total)[2], float (&shrink)[2], float scale) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float higher = top[r], sum = 0.f;
    for (int i = 0; i < 64; i++)
      if (i / 2 % 2 == r) higher = fmaxf(higher, s[i]);
    higher = over_row(higher, true);
    float base = higher == -INFINITY ? 0.f : higher * scale;             // -inf minus -inf is no number
    for (int i = 0; i < 64; i++)
      if (i / 2 % 2 == r) sum += s[i] = exp2_fast(s[i] * scale - base);
    shrink[r] = exp2_fast(top[r] * scale - base);
    total[r] = total[r] * shrink[r] + sum;
    top[r] = higher;
  }
}

template <int D> struct Shared {
  Tile<D> q, k[STAGES], v[STAGES];
  uint64_t full_q, full_k[STAGES], full_v[STAGES], empty[STAGES];
};

template <int D> __global__ void __launch_bounds__(THREADS, 1)
forward(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
        bf16* o, float* lse, Visits at, const uint32_t* bits, int nq, float scale) {
  SHARED_MEMORY(memory);
  Shared<D>& mem = aligned<Shared<D>>(memory);
  int tile = at.order[blockIdx.x], first = at.start[tile], count = at.start[tile + 1] - first;
  int group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    barrier_init(&mem.full_q, 1);
    for (int s = 0; s < STAGES; s++) {
      barrier_init(&mem.full_k[s], 1);
      barrier_init(&mem.full_v[s], 1);
      barrier_init(&mem.empty[s], 2 * 128);
    }
    barrier_fence();
  }
  __syncthreads();

  if (group == 2) {                                                      // the producer
    less_registers<24>();
    if (threadIdx.x % 128) return;
    if (count) copy_tile<D, TILE>(mem.q, &q, tile * TILE, &mem.full_q);
    for (int e = 0; e < count; e++) {
      int stage = e % STAGES, row = at.other[first + e] * TILE;
      if (e >= STAGES) barrier_wait(&mem.empty[stage], e / STAGES % 2 ^ 1);
      copy_tile<D, TILE>(mem.k[stage], &k, row, &mem.full_k[stage]);
      copy_tile<D, TILE>(mem.v[stage], &v, row, &mem.full_v[stage]);
    }
    return;
  }

  more_registers<240>();
  float out[D / 2] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  float s[64], shrink[2];
  uint32_t p[32];
  if (count) {
    barrier_wait(&mem.full_q, 0);
    barrier_wait(&mem.full_k[0], 0);
    wgmma_fence();
    scores<D, TILE>(s, mem.q, mem.k[0], group);
    wgmma_commit();
    wgmma_wait<0>();
    settled(s);
    if (at.bits[first] >= 0) hide<TILE>(s, bits + at.bits[first] * 512L + threadIdx.x * 2);
    soften(s, top, total, shrink, scale);
    to_operand<TILE>(p, s);
  }
  for (int e = 1; e < count; e++) {                                      // P V of the tile before, beside this softmax
    int stage = e % STAGES, before = (e - 1) % STAGES, number = at.bits[first + e];
    barrier_wait(&mem.full_k[stage], e / STAGES % 2);
    barrier_wait(&mem.full_v[before], (e - 1) / STAGES % 2);
    wgmma_fence();
    scores<D, TILE>(s, mem.q, mem.k[stage], group);
    wgmma_commit();
    times<D, TILE>(out, p, mem.v[before]);
    wgmma_commit();
    wgmma_wait<1>();
    settled(s);
    if (number >= 0) hide<TILE>(s, bits + number * 512L + threadIdx.x * 2);
    soften(s, top, total, shrink, scale);
    wgmma_wait<0>();
    settled(out);
    barrier_arrive(&mem.empty[before]);
    for (int i = 0; i < D / 2; i++) out[i] *= shrink[i / 2 % 2];
    to_operand<TILE>(p, s);
  }
  if (count) {
    int stage = (count - 1) % STAGES;
    barrier_wait(&mem.full_v[stage], (count - 1) / STAGES % 2);
    wgmma_fence();
    times<D, TILE>(out, p, mem.v[stage]);
    wgmma_commit();
    wgmma_wait<0>();
    settled(out);
  }

  float sum0 = over_row(total[0], false), sum1 = over_row(total[1], false);
  write<D>(o, out, sum0 > 0.f ? 1.f / sum0 : 0.f, sum1 > 0.f ? 1.f / sum1 : 0.f, tile, nq);
  int row = tile * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  lse += (long)blockIdx.y * nq;
  if (threadIdx.x % 4 == 0 && row < nq) lse[row] = sum0 > 0.f ? top[0] * scale + log2f(sum0) : INFINITY;
  if (threadIdx.x % 4 == 0 && row + 8 < nq) lse[row + 8] = sum1 > 0.f ? top[1] * scale + log2f(sum1) : INFINITY;
}

template <int D, int M> struct BackwardShared {
  Tile<D> a, b;
  Tile<D, M> x[STAGES], y[STAGES];
  float2 lse_delta[STAGES][M];                                           // of the rows of x and y, where these are queries
  uint64_t full, full_x[STAGES], full_y[STAGES], empty[STAGES];
};

// Both halves of the backward pass, M rows at a time of the tiles that pass by. OF_KEYS: a, b are k, v of a key tile, and
// q, do pass by as x, y; else a, b are q, do of a query tile, and k, v pass by. da takes dS x, and for keys db takes P y.
template <int D, bool OF_KEYS, int M> __global__ void __launch_bounds__(THREADS, 1)
backward(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap x,
         const __grid_constant__ CUtensorMap y, bf16* da, bf16* db, const float* lse, const float* delta, Visits at,
         const uint32_t* bits, int n, int m, float scale, float factor) {
  SHARED_MEMORY(memory);
  auto& mem = aligned<BackwardShared<D, M>>(memory);
  constexpr int PARTS = TILE / M;
  int tile = at.order[blockIdx.x], first = at.start[tile], count = (at.start[tile + 1] - first) * PARTS;
  int group = threadIdx.x / 128, lane = threadIdx.x % 4;
  if (threadIdx.x == 0) {
    barrier_init(&mem.full, 2);
    for (int s = 0; s < STAGES; s++) {
      barrier_init(&mem.full_x[s], OF_KEYS ? 1 + 32 : 1);
      barrier_init(&mem.full_y[s], 1);
      barrier_init(&mem.empty[s], 2 * 128);
    }
    barrier_fence();
  }
  __syncthreads();

  lse += (long)blockIdx.y * (OF_KEYS ? m : n);
  delta += (long)blockIdx.y * (OF_KEYS ? m : n);
  if (group == 2) {                                                      // the producer
    less_registers<24>();
    int me = threadIdx.x % 128;
    if (me >= (OF_KEYS ? 32 : 1)) return;
    if (me == 0) copy_tile<D, TILE>(mem.a, &a, tile * TILE, &mem.full);
    if (me == 0) copy_tile<D, TILE>(mem.b, &b, tile * TILE, &mem.full);
    for (int e = 0; e < count; e++) {
      int stage = e % STAGES, row = at.other[first + e / PARTS] * TILE + e % PARTS * M;
      if (e >= STAGES) barrier_wait(&mem.empty[stage], e / STAGES % 2 ^ 1);
      if (me == 0) copy_tile<D, M>(mem.x[stage], &x, row, &mem.full_x[stage]);
      if (me == 0) copy_tile<D, M>(mem.y[stage], &y, row, &mem.full_y[stage]);
      for (int c = me; OF_KEYS && c < M; c += 32) {
        int j = min(row + c, m - 1);                                     // what lies behind the last is hidden
        mem.lse_delta[stage][c] = make_float2(lse[j], delta[j]);
      }
      if (OF_KEYS) barrier_arrive(&mem.full_x[stage]);
    }
    return;
  }

  more_registers<240>();
  float ga[D / 2] = {}, gb[D / 2] = {};
  float2 mine[2] = {};                                                   // lse, delta of this thread's rows
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = tile * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
    if (!OF_KEYS && row < n) mine[r] = make_float2(lse[row], delta[row]);
  }
  barrier_wait(&mem.full, 0);
  for (int e = 0; e < count; e++) {
    int stage = e % STAGES, parity = e / STAGES % 2, number = at.bits[first + e / PARTS];
    float s[M / 2], dp[M / 2];
    uint32_t p[M / 4];
    barrier_wait(&mem.full_x[stage], parity);
    wgmma_fence();
    scores<D, M>(s, mem.a, mem.x[stage], group);
    wgmma_commit();
    barrier_wait(&mem.full_y[stage], parity);
    wgmma_fence();
    scores<D, M>(dp, mem.b, mem.y[stage], group);
    wgmma_commit();
    wgmma_wait<0>();
    settled(s);
    settled(dp);
    if (number >= 0) hide<M>(s, bits + number * 512L + threadIdx.x * 2 + e % PARTS);
#pragma unroll
    for (int i = 0; i < M / 2; i++) {
      float2 of = OF_KEYS ? mem.lse_delta[stage][i / 4 * 8 + 2 * lane + i % 2] : mine[i / 2 % 2];
      s[i] = exp2_fast(s[i] * scale - of.x);
      dp[i] = s[i] * (dp[i] - of.y);
    }
    if (OF_KEYS) {
      to_operand<M>(p, s);
      wgmma_fence();
      times<D, M>(gb, p, mem.y[stage]);
      wgmma_commit();
      wgmma_wait<0>();
    }
    to_operand<M>(p, dp);
    wgmma_fence();
    times<D, M>(ga, p, mem.x[stage]);
    wgmma_commit();
    wgmma_wait<0>();
    settled(ga);
    settled(gb);
    barrier_arrive(&mem.empty[stage]);
  }
  write<D>(da, ga, factor, factor, tile, n);
  if (OF_KEYS) write<D>(db, gb, 1.f, 1.f, tile, n);
}

// ---- from the host: each function returns a cudaError ---------------------------------------------------------------

#define TRY(call) if (int code = (call)) return code

template <class Mem, class F> int room(F* kernel) {                        // shared memory to ask for
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(Mem) + 1024);
}

template <int D> int run(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, Visits at, const uint32_t* bits,
                         int nq, int nk, int heads, float scale, cudaStream_t stream) {
  CUtensorMap mq, mk, mv;
  TRY(make_map(&mq, q, nq, heads, D, TILE));
  TRY(make_map(&mk, k, nk, heads, D, TILE));
  TRY(make_map(&mv, v, nk, heads, D, TILE));
  TRY(room<Shared<D>>(forward<D>));
  LAUNCH(forward<D>, dim3((nq + TILE - 1) / TILE, heads), sizeof(Shared<D>) + 1024, mq, mk, mv, o, lse, at, bits, nq,
         scale * 1.44269504f);
  return cudaGetLastError();
}

template <int D, bool OF_KEYS, int M> int run_half(const bf16* a, const bf16* b, const bf16* x, const bf16* y, bf16* da,
    bf16* db, const float* lse, const float* delta, Visits at, const uint32_t* bits, int n, int m, int heads, float scale,
    cudaStream_t stream) {
  CUtensorMap ma, mb, mx, my;
  TRY(make_map(&ma, a, n, heads, D, TILE));
  TRY(make_map(&mb, b, n, heads, D, TILE));
  TRY(make_map(&mx, x, m, heads, D, M));
  TRY(make_map(&my, y, m, heads, D, M));
  typedef BackwardShared<D, M> Mem;
  TRY(room<Mem>(backward<D, OF_KEYS, M>));
  LAUNCH((backward<D, OF_KEYS, M>), dim3((n + TILE - 1) / TILE, heads), sizeof(Mem) + 1024, ma, mb, mx, my, da, db, lse,
         delta, at, bits, n, m, scale * 1.44269504f, scale);
  return cudaGetLastError();
}

template <int D> int run_back(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,
    const float* delta, bf16* dq, bf16* dk, bf16* dv, Visits by_query, Visits by_key, const uint32_t* bits,
    const uint32_t* bits_t, int nq, int nk, int heads, float scale, cudaStream_t stream) {
  TRY((run_half<D, true, 64>(k, v, q, dout, dk, dv, lse, delta, by_key, bits_t, nk, nq, heads, scale, stream)));
  return run_half<D, false, TILE>(q, dout, k, v, dq, nullptr, lse, delta, by_query, bits, nq, nk, heads, scale, stream);
}

#include "entry.cuh"
