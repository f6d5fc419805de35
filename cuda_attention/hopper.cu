// Hopper kernels: masked attention on tensor cores (sm_90a). tiles.py defines tiles and bits;
// blockwise.py is the same algorithm in PyTorch.
//
// A block has one producer warpgroup, whose first thread copies tiles by TMA through a ring of two
// stages, and two consumer warpgroups. Each consumer has 64 of the 128 rows of the block's tile:
// queries in forward and dQ, keys in dK and dV. Scores and their gradients live in registers; every
// output is written once, by one block, so two runs give the same bits.
//
// Letters: s scores, p weights, dp their gradient, D head width, M rows of a visited (part of a)
// tile. In a warpgroup of 128 threads, thread 32 w + 4 u + x holds rows 16 w + u and + 8.
#ifdef EMULATED                  // on a CPU, for tests: tests/cuda/emulate.h
#include "emulate.h"
#else
#include "hopper.cuh"
#endif

constexpr int TILE = 128, STAGES = 2, THREADS = 384;
struct Visits { const int *start, *tile_index, *bits, *schedule; };

template <int D, int ROWS = TILE> using Tile = bf16[D / 64][ROWS][64];   // boxes of 64 columns

// ---- Copies and products ----------------------------------------------------------------------

// Copies the rows from `row` on; `full` is arrived at now, and its phase ends when they are there.
template <int D, int ROWS>
__device__ inline void copy_tile(Tile<D, ROWS>& to, const CUtensorMap* x, int row, uint64_t* full) {
  barrier_expect(full, sizeof(to));
  for (int box = 0; box < D / 64; box++)
    copy_box(to[box], x, box * 64, blockIdx.y, row, full);
}

// s (64 x M) = a b^T for the 64 rows of a of warpgroup w and all M rows of b: both K-major.
template <int D, int M>
__device__ inline void scores(float (&s)[M / 2], const Tile<D>& a, const Tile<D, M>& b, int w) {
  for (int k = 0; k < D / 16; k++)
    wgmma<M, false>(s, descriptor(&a[k / 4][64 * w][k % 4 * 16], 0),
                    descriptor(&b[k / 4][0][k % 4 * 16], 0), k > 0);
}

// out (64 x D) += p b, p (64 x M) in registers and b (M x D) in shared memory.
template <int D, int M>
__device__ inline void accumulate_pv(float (&out)[D / 2], const uint32_t (&p)[M / 4],
                                     const Tile<D, M>& b) {
  for (int k = 0; k < M / 16; k++)
    wgmma<D, true>(out, &p[4 * k], descriptor(&b[0][16 * k][0], sizeof(b[0])), 1);
}

// Accumulator elements 4 i + 2 r + c are row u + 8 r, column 8 i + 2 x + c. As operand: pairs.
template <int M>
__device__ inline void to_operand(uint32_t (&p)[M / 4], const float (&s)[M / 2]) {
  for (int i = 0; i < M / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// Writes -inf where a partial tile masks. words: the bits of this thread for the M columns.
template <int M>
__device__ inline void apply_mask(float (&s)[M / 2], const uint32_t* words) {
  for (int i = 0; i < M / 2; i++)
    if (!(words[i / 32] >> i % 32 & 1)) s[i] = -INFINITY;
}

// Writes this thread's rows r = 0, 1 of an output tile: the accumulators times a factor a row.
template <int D>
__device__ inline void write(bf16* to, const float (&out)[D / 2], float f0, float f1, int tile,
                             int n) {
  int me = threadIdx.x % 128;
  int row = tile * TILE + threadIdx.x / 128 * 64 + me / 32 * 16 + me % 32 / 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    bf16* row_start = to + ((long)(row + 8 * r) * gridDim.y + blockIdx.y) * D;
    uint32_t* at = reinterpret_cast<uint32_t*>(row_start) + me % 4;
    float f = r ? f1 : f0;
    if (row + 8 * r < n)
      for (int i = 0; i < D / 8; i++)
        at[4 * i] = pack(out[4 * i + 2 * r] * f, out[4 * i + 2 * r + 1] * f);
  }
}

template <class T> __device__ inline T& aligned(uint8_t* memory) {       // to 1024 bytes
  return *reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
}

__device__ inline float over_row(float x, bool maximum) {                // 4 lanes share a row
  for (int lane = 1; lane < 4; lane *= 2) {
    float other = __shfl_xor_sync(0xffffffff, x, lane);
    x = maximum ? fmaxf(x, other) : x + other;
  }
  return x;
}

// Online softmax of two rows: turns scores s into weights and updates row_max and row_sum. Sums of
// earlier tiles must be multiplied by rescale.
__device__ inline void online_softmax(float (&s)[64], float (&row_max)[2], float (&row_sum)[2],
                                      float (&rescale)[2], float scale) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float new_max = row_max[r], sum = 0.f;
    for (int i = 0; i < 64; i++)
      if (i / 2 % 2 == r) new_max = fmaxf(new_max, s[i]);
    new_max = over_row(new_max, true);
    float base = new_max == -INFINITY ? 0.f : new_max * scale;           // -inf minus -inf is NaN
    for (int i = 0; i < 64; i++)
      if (i / 2 % 2 == r) sum += s[i] = exp2_fast(s[i] * scale - base);
    rescale[r] = exp2_fast(row_max[r] * scale - base);
    row_sum[r] = row_sum[r] * rescale[r] + sum;
    row_max[r] = new_max;
  }
}

// ---- Forward ----------------------------------------------------------------------------------

template <int D> struct Shared {
  Tile<D> q, k[STAGES], v[STAGES];
  uint64_t full_q, full_k[STAGES], full_v[STAGES], empty[STAGES];
};

template <int D>
__global__ void __launch_bounds__(THREADS, 1)
forward(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
        const __grid_constant__ CUtensorMap v, bf16* o, float* lse, Visits visits,
        const uint32_t* bits, int nq, float scale) {
  SHARED_MEMORY(memory);
  Shared<D>& mem = aligned<Shared<D>>(memory);
  int tile = visits.schedule[blockIdx.x];
  int first = visits.start[tile], count = visits.start[tile + 1] - first;
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
      int stage = e % STAGES, row = visits.tile_index[first + e] * TILE;
      if (e >= STAGES) barrier_wait(&mem.empty[stage], e / STAGES % 2 ^ 1);
      copy_tile<D, TILE>(mem.k[stage], &k, row, &mem.full_k[stage]);
      copy_tile<D, TILE>(mem.v[stage], &v, row, &mem.full_v[stage]);
    }
    return;
  }

  more_registers<240>();                                                 // the consumers
  float out[D / 2] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
  float s[64], rescale[2];
  uint32_t p[32];
  if (count) {                                                           // the first tile's p
    barrier_wait(&mem.full_q, 0);
    barrier_wait(&mem.full_k[0], 0);
    wgmma_fence();
    scores<D, TILE>(s, mem.q, mem.k[0], group);
    wgmma_commit();
    wgmma_wait<0>();
    wait_registers(s);
    int number = visits.bits[first];
    if (number >= 0) apply_mask<TILE>(s, bits + number * 512L + threadIdx.x * 2);
    online_softmax(s, row_max, row_sum, rescale, scale);
    to_operand<TILE>(p, s);
  }
  for (int e = 1; e < count; e++) {           // p v of the previous tile runs during this softmax
    int stage = e % STAGES, previous = (e - 1) % STAGES, number = visits.bits[first + e];
    barrier_wait(&mem.full_k[stage], e / STAGES % 2);
    barrier_wait(&mem.full_v[previous], (e - 1) / STAGES % 2);
    wgmma_fence();
    scores<D, TILE>(s, mem.q, mem.k[stage], group);
    wgmma_commit();
    accumulate_pv<D, TILE>(out, p, mem.v[previous]);
    wgmma_commit();
    wgmma_wait<1>();
    wait_registers(s);
    if (number >= 0) apply_mask<TILE>(s, bits + number * 512L + threadIdx.x * 2);
    online_softmax(s, row_max, row_sum, rescale, scale);
    wgmma_wait<0>();
    wait_registers(out);
    barrier_arrive(&mem.empty[previous]);
    for (int i = 0; i < D / 2; i++) out[i] *= rescale[i / 2 % 2];
    to_operand<TILE>(p, s);
  }
  if (count) {                                                           // p v of the last tile
    int stage = (count - 1) % STAGES;
    barrier_wait(&mem.full_v[stage], (count - 1) / STAGES % 2);
    wgmma_fence();
    accumulate_pv<D, TILE>(out, p, mem.v[stage]);
    wgmma_commit();
    wgmma_wait<0>();
    wait_registers(out);
  }

  float sum0 = over_row(row_sum[0], false), sum1 = over_row(row_sum[1], false);
  write<D>(o, out, sum0 > 0.f ? 1.f / sum0 : 0.f, sum1 > 0.f ? 1.f / sum1 : 0.f, tile, nq);
  int row = tile * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  lse += (long)blockIdx.y * nq;
  if (threadIdx.x % 4 == 0 && row < nq)
    lse[row] = sum0 > 0.f ? row_max[0] * scale + log2f(sum0) : INFINITY;
  if (threadIdx.x % 4 == 0 && row + 8 < nq)
    lse[row + 8] = sum1 > 0.f ? row_max[1] * scale + log2f(sum1) : INFINITY;
}

// ---- Backward ---------------------------------------------------------------------------------

template <int D, int M> struct BackwardShared {
  Tile<D> a, b;
  Tile<D, M> x[STAGES], y[STAGES];
  float2 lse_delta[STAGES][M];                       // of the rows of x and y, if these are queries
  uint64_t full, full_x[STAGES], full_y[STAGES], empty[STAGES];
};

// Both halves of the backward pass; the visited tiles pass M rows at a time. OF_KEYS: a, b are k, v
// of a key tile, and x, y are q, do of the visited tiles. Otherwise a, b are q, do of a query tile,
// and x, y are k, v. da accumulates dS x; for keys, db accumulates P y.
template <int D, bool OF_KEYS, int M>
__global__ void __launch_bounds__(THREADS, 1)
backward(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
         const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y, bf16* da,
         bf16* db, const float* lse, const float* delta, Visits visits, const uint32_t* bits, int n,
         int m, float scale, float factor) {
  SHARED_MEMORY(memory);
  auto& mem = aligned<BackwardShared<D, M>>(memory);
  constexpr int PARTS = TILE / M;
  int tile = visits.schedule[blockIdx.x], first = visits.start[tile];
  int count = (visits.start[tile + 1] - first) * PARTS;
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
      int stage = e % STAGES, row = visits.tile_index[first + e / PARTS] * TILE + e % PARTS * M;
      if (e >= STAGES) barrier_wait(&mem.empty[stage], e / STAGES % 2 ^ 1);
      if (me == 0) copy_tile<D, M>(mem.x[stage], &x, row, &mem.full_x[stage]);
      if (me == 0) copy_tile<D, M>(mem.y[stage], &y, row, &mem.full_y[stage]);
      for (int c = me; OF_KEYS && c < M; c += 32) {
        int j = min(row + c, m - 1);                                     // later rows are masked
        mem.lse_delta[stage][c] = make_float2(lse[j], delta[j]);
      }
      if (OF_KEYS) barrier_arrive(&mem.full_x[stage]);
    }
    return;
  }

  more_registers<240>();                                                 // the consumers
  float da_rows[D / 2] = {}, db_rows[D / 2] = {};
  float2 row_stats[2] = {};                                  // lse and delta of this thread's rows
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = tile * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
    if (!OF_KEYS && row < n) row_stats[r] = make_float2(lse[row], delta[row]);
  }
  barrier_wait(&mem.full, 0);
  for (int e = 0; e < count; e++) {
    int stage = e % STAGES, parity = e / STAGES % 2, number = visits.bits[first + e / PARTS];
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
    wait_registers(s);
    wait_registers(dp);
    if (number >= 0) apply_mask<M>(s, bits + number * 512L + threadIdx.x * 2 + e % PARTS);
#pragma unroll
    for (int i = 0; i < M / 2; i++) {                                // s becomes p, dp becomes dS
      int column = i / 4 * 8 + 2 * lane + i % 2;
      float2 stats = OF_KEYS ? mem.lse_delta[stage][column] : row_stats[i / 2 % 2];
      s[i] = exp2_fast(s[i] * scale - stats.x);
      dp[i] = s[i] * (dp[i] - stats.y);
    }
    if (OF_KEYS) {
      to_operand<M>(p, s);
      wgmma_fence();
      accumulate_pv<D, M>(db_rows, p, mem.y[stage]);
      wgmma_commit();
      wgmma_wait<0>();
    }
    to_operand<M>(p, dp);
    wgmma_fence();
    accumulate_pv<D, M>(da_rows, p, mem.x[stage]);
    wgmma_commit();
    wgmma_wait<0>();
    wait_registers(da_rows);
    wait_registers(db_rows);
    barrier_arrive(&mem.empty[stage]);
  }
  write<D>(da, da_rows, factor, factor, tile, n);
  if (OF_KEYS) write<D>(db, db_rows, 1.f, 1.f, tile, n);
}

// ---- On the host: each function returns a cudaError -------------------------------------------

#define TRY(call) if (int code = (call)) return code

template <class Mem, class F> int request_shared_memory(F* kernel) {
  int bytes = sizeof(Mem) + 1024;                                        // and room for alignment
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <int D>
int run(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, Visits row_tiles,
        const uint32_t* bits, int nq, int nk, int heads, float scale, cudaStream_t stream) {
  CUtensorMap map_q, map_k, map_v;
  TRY(make_map(&map_q, q, nq, heads, D, TILE));
  TRY(make_map(&map_k, k, nk, heads, D, TILE));
  TRY(make_map(&map_v, v, nk, heads, D, TILE));
  TRY(request_shared_memory<Shared<D>>(forward<D>));
  LAUNCH(forward<D>, dim3((nq + TILE - 1) / TILE, heads), sizeof(Shared<D>) + 1024, map_q, map_k,
         map_v, o, lse, row_tiles, bits, nq, scale * 1.44269504f);
  return cudaGetLastError();
}

template <int D, bool OF_KEYS, int M>
int run_half(const bf16* a, const bf16* b, const bf16* x, const bf16* y, bf16* da, bf16* db,
             const float* lse, const float* delta, Visits visits, const uint32_t* bits, int n,
             int m, int heads, float scale, cudaStream_t stream) {
  CUtensorMap map_a, map_b, map_x, map_y;
  TRY(make_map(&map_a, a, n, heads, D, TILE));
  TRY(make_map(&map_b, b, n, heads, D, TILE));
  TRY(make_map(&map_x, x, m, heads, D, M));
  TRY(make_map(&map_y, y, m, heads, D, M));
  typedef BackwardShared<D, M> Mem;
  TRY(request_shared_memory<Mem>(backward<D, OF_KEYS, M>));
  LAUNCH((backward<D, OF_KEYS, M>), dim3((n + TILE - 1) / TILE, heads), sizeof(Mem) + 1024, map_a,
         map_b, map_x, map_y, da, db, lse, delta, visits, bits, n, m, scale * 1.44269504f, scale);
  return cudaGetLastError();
}

template <int D>
int run_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,
                 const float* delta, bf16* dq, bf16* dk, bf16* dv, Visits row_tiles,
                 Visits column_tiles, const uint32_t* bits, const uint32_t* bits_t, int nq, int nk,
                 int heads, float scale, cudaStream_t stream) {
  TRY((run_half<D, true, 64>(k, v, q, dout, dk, dv, lse, delta, column_tiles, bits_t, nk, nq,
                             heads, scale, stream)));
  return run_half<D, false, TILE>(q, dout, k, v, dq, nullptr, lse, delta, row_tiles, bits, nq, nk,
                                  heads, scale, stream);
}

#include "entry.cuh"
