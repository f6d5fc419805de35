// Plain kernels: masked attention without tensor cores, for any GPU from sm_80; easy to read, slow.
//
// The rows of a tile (queries, or keys for dK and dV) stay with the threads: D / 32 neighbouring
// lanes share a row, with 32 channels each. The rows of the visited tiles pass through shared
// memory, 32 at a time. tiles.py defines tiles and bits; blockwise.py is the same algorithm in
// PyTorch.
#ifdef EMULATED                  // on a CPU, for tests: tests/cuda/emulate.h
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <stdint.h>
#define LAUNCH(kernel, grid, bytes, ...) kernel<<<grid, THREADS, bytes, stream>>>(__VA_ARGS__)
#endif

constexpr int TILE = 128, CHANNELS = 32, CHUNK = 32, THREADS = 256;
typedef __nv_bfloat16 bf16;
struct Visits { const int *start, *tile_index, *bits, *schedule; };

// ---- Loads and stores -------------------------------------------------------------------------

// Whether bit (row, column) of a partial tile is set: the order is that of a WGMMA accumulator.
__device__ bool allowed(const uint32_t* bits, int row, int column) {
  int thread = row / 64 * 128 + row % 64 / 16 * 32 + row % 8 * 4 + column % 8 / 2;
  int bit = column % 64 / 8 * 4 + row % 16 / 8 * 2 + column % 2;
  return bits[thread * 2 + column / 64] >> bit & 1;
}

// Row i of x (n, heads, D), the 32 channels of this lane; zeros after the last row.
template <int D>
__device__ void load(float (&to)[CHANNELS], const bf16* x, int i, int n, int lane) {
  for (int c = 0; c < CHANNELS; c++) {
    long at = ((long)i * gridDim.y + blockIdx.y) * D + lane * CHANNELS + c;
    to[c] = i < n ? __bfloat162float(x[at]) : 0.f;
  }
}

template <int D>
__device__ void store(bf16* x, const float (&from)[CHANNELS], float factor, int i, int n,
                      int lane) {
  for (int c = 0; c < CHANNELS && i < n; c++) {
    long at = ((long)i * gridDim.y + blockIdx.y) * D + lane * CHANNELS + c;
    x[at] = __float2bfloat16(from[c] * factor);
  }
}

// Rows j .. j + 31 of x into shared memory, by all threads.
template <int D> __device__ void stage(float (*to)[D], const bf16* x, int j, int n) {
  for (int at = threadIdx.x; at < CHUNK * D; at += THREADS) {
    int r = at / D, c = at % D;
    long from = ((long)(j + r) * gridDim.y + blockIdx.y) * D + c;
    to[r][c] = j + r < n ? __bfloat162float(x[from]) : 0.f;
  }
}

// The product of two rows, summed over the lanes that share them.
template <int LANES> __device__ float dot(const float (&a)[CHANNELS], const float* b) {
  float sum = 0.f;
  for (int c = 0; c < CHANNELS; c++) sum += a[c] * b[c];
  for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  return sum;
}

// ---- Kernels ----------------------------------------------------------------------------------

template <int D>
__global__ void forward(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse,
                        Visits visits, const uint32_t* bits, int nq, int nk, float scale) {
  constexpr int LANES = D / CHANNELS, ROWS = THREADS / LANES;
  __shared__ float ks[CHUNK][D], vs[CHUNK][D];
  int tile = visits.schedule[blockIdx.x / (TILE / ROWS)], lane = threadIdx.x % LANES;
  int row = blockIdx.x % (TILE / ROWS) * ROWS + threadIdx.x / LANES, i = tile * TILE + row;
  float q_row[CHANNELS], out[CHANNELS] = {}, row_max = -INFINITY, row_sum = 0.f;
  load<D>(q_row, q, i, nq, lane);
  for (int e = visits.start[tile]; e < visits.start[tile + 1]; e++)
    for (int chunk = 0; chunk < TILE; chunk += CHUNK) {
      int j = visits.tile_index[e] * TILE + chunk, number = visits.bits[e];
      __syncthreads();
      stage<D>(ks, k, j, nk);
      stage<D>(vs, v, j, nk);
      __syncthreads();
      for (int c = 0; c < CHUNK && j + c < nk; c++) {
        float s = dot<LANES>(q_row, ks[c] + lane * CHANNELS) * scale;
        if (number >= 0 && !allowed(bits + number * 512L, row, chunk + c)) continue;
        float new_max = fmaxf(row_max, s);               // online softmax
        float rescale = exp2f(row_max - new_max), p = exp2f(s - new_max);
        row_sum = row_sum * rescale + p;
        for (int x = 0; x < CHANNELS; x++)
          out[x] = out[x] * rescale + p * vs[c][lane * CHANNELS + x];
        row_max = new_max;
      }
    }
  store<D>(o, out, row_sum > 0.f ? 1.f / row_sum : 0.f, i, nq, lane);
  if (lane == 0 && i < nq)
    lse[(long)blockIdx.y * nq + i] = row_sum > 0.f ? row_max + log2f(row_sum) : INFINITY;
}

// Both halves of the backward pass. OF_KEYS: rows a, b are k, v of a key tile, and q, do of the
// visited tiles are x, y. Otherwise rows a, b are q, do of a query tile, and k, v are x, y.
// da accumulates dS x; for keys, db accumulates p y.
template <int D, bool OF_KEYS>
__global__ void backward(const bf16* a, const bf16* b, const bf16* x, const bf16* y, bf16* da,
                         bf16* db, const float* lse, const float* delta, Visits visits,
                         const uint32_t* bits, int n, int m, float scale, float factor) {
  constexpr int LANES = D / CHANNELS, ROWS = THREADS / LANES;
  __shared__ float xs[CHUNK][D], ys[CHUNK][D];
  int tile = visits.schedule[blockIdx.x / (TILE / ROWS)], lane = threadIdx.x % LANES;
  int row = blockIdx.x % (TILE / ROWS) * ROWS + threadIdx.x / LANES, i = tile * TILE + row;
  float a_row[CHANNELS], b_row[CHANNELS], da_row[CHANNELS] = {}, db_row[CHANNELS] = {};
  load<D>(a_row, a, i, n, lane);
  load<D>(b_row, b, i, n, lane);
  for (int e = visits.start[tile]; e < visits.start[tile + 1]; e++)
    for (int chunk = 0; chunk < TILE; chunk += CHUNK) {
      int j = visits.tile_index[e] * TILE + chunk, number = visits.bits[e];
      __syncthreads();
      stage<D>(xs, x, j, m);
      stage<D>(ys, y, j, m);
      __syncthreads();
      for (int c = 0; c < CHUNK && j + c < m; c++) {
        float s = dot<LANES>(a_row, xs[c] + lane * CHANNELS) * scale;
        float dp = dot<LANES>(b_row, ys[c] + lane * CHANNELS);
        if (i >= n || (number >= 0 && !allowed(bits + number * 512L, row, chunk + c))) continue;
        long query = (long)blockIdx.y * (OF_KEYS ? m : n) + (OF_KEYS ? j + c : i);
        float p = exp2f(s - lse[query]), ds = p * (dp - delta[query]);
        for (int z = 0; z < CHANNELS; z++) {
          da_row[z] += ds * xs[c][lane * CHANNELS + z];
          if (OF_KEYS) db_row[z] += p * ys[c][lane * CHANNELS + z];
        }
      }
    }
  store<D>(da, da_row, factor, i, n, lane);
  if (OF_KEYS) store<D>(db, db_row, 1.f, i, n, lane);
}

// ---- On the host: each function returns a cudaError -------------------------------------------

template <int D> dim3 blocks(int n, int heads) {
  return dim3((n + TILE - 1) / TILE * (TILE * D / CHANNELS / THREADS), heads);
}

template <int D>
int run(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, Visits row_tiles,
        const uint32_t* bits, int nq, int nk, int heads, float scale, cudaStream_t stream) {
  LAUNCH(forward<D>, blocks<D>(nq, heads), 0, q, k, v, o, lse, row_tiles, bits, nq, nk,
         scale * 1.44269504f);
  return cudaGetLastError();
}

template <int D>
int run_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,
                 const float* delta, bf16* dq, bf16* dk, bf16* dv, Visits row_tiles,
                 Visits column_tiles, const uint32_t* bits, const uint32_t* bits_t, int nq, int nk,
                 int heads, float scale, cudaStream_t stream) {
  float base2 = scale * 1.44269504f;
  LAUNCH((backward<D, true>), blocks<D>(nk, heads), 0, k, v, q, dout, dk, dv, lse, delta,
         column_tiles, bits_t, nk, nq, base2, scale);
  LAUNCH((backward<D, false>), blocks<D>(nq, heads), 0, q, dout, k, v, dq, (bf16*)nullptr, lse,
         delta, row_tiles, bits, nq, nk, base2, scale);
  return cudaGetLastError();
}

#include "entry.cuh"
