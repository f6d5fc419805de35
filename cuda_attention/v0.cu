// v0: masked attention without tensor cores, the first rung and the oracle on the GPU. Any GPU from sm_80.
//
// The rows of a tile (queries, or keys in dkv) stay with the threads, each row with D / 32 neighbouring lanes of 32
// channels; the rows of the tiles it visits pass through shared memory, 32 at a time. Tiles, bits and lse are those of
// tiles.py and blockwise.py, which is the same algorithm in PyTorch.
#ifdef EMULATED                  // on a CPU, for tests: tests/emulate.h
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <stdint.h>
#define LAUNCH(kernel, grid, bytes, ...) kernel<<<grid, THREADS, bytes, stream>>>(__VA_ARGS__)
#endif

constexpr int TILE = 128, CHANNELS = 32, CHUNK = 32, THREADS = 256;
typedef __nv_bfloat16 bf16;
struct Visits { const int *start, *other, *bits, *order; };

// Whether bit (row, column) of a partial tile is set: bits lie as in the accumulator of a WGMMA.
__device__ bool sees(const uint32_t* bits, int row, int column) {
  int thread = row / 64 * 128 + row % 64 / 16 * 32 + row % 8 * 4 + column % 8 / 2;
  return bits[thread * 2 + column / 64] >> (column % 64 / 8 * 4 + row % 16 / 8 * 2 + column % 2) & 1;
}

// Row i of x (N, heads, D), from this lane's channels on; 0 behind the last row.
template <int D> __device__ void load(float (&to)[CHANNELS], const bf16* x, int i, int n, int lane) {
  for (int c = 0; c < CHANNELS; c++)
    to[c] = i < n ? __bfloat162float(x[((long)i * gridDim.y + blockIdx.y) * D + lane * CHANNELS + c]) : 0.f;
}

template <int D> __device__ void store(bf16* x, const float (&from)[CHANNELS], float factor, int i, int n, int lane) {
  for (int c = 0; c < CHANNELS && i < n; c++)
    x[((long)i * gridDim.y + blockIdx.y) * D + lane * CHANNELS + c] = __float2bfloat16(from[c] * factor);
}

// Rows j .. j + 31 of x into shared memory, by all threads.
template <int D> __device__ void stage(float (*to)[D], const bf16* x, int j, int n) {
  for (int at = threadIdx.x; at < CHUNK * D; at += THREADS) {
    int r = at / D, c = at % D;
    to[r][c] = j + r < n ? __bfloat162float(x[((long)(j + r) * gridDim.y + blockIdx.y) * D + c]) : 0.f;
  }
}

template <int LANES> __device__ float dot(const float (&a)[CHANNELS], const float* b) {
  float sum = 0.f;
  for (int c = 0; c < CHANNELS; c++) sum += a[c] * b[c];
  for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  return sum;
}

template <int D> __global__ void forward(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, Visits at,
                                         const uint32_t* bits, int nq, int nk, float scale) {
  constexpr int LANES = D / CHANNELS, ROWS = THREADS / LANES;
  __shared__ float ks[CHUNK][D], vs[CHUNK][D];
  int tile = at.order[blockIdx.x / (TILE / ROWS)], lane = threadIdx.x % LANES;
  int row = blockIdx.x % (TILE / ROWS) * ROWS + threadIdx.x / LANES, i = tile * TILE + row;
  float mine[CHANNELS], out[CHANNELS] = {}, top = -INFINITY, total = 0.f;
  load<D>(mine, q, i, nq, lane);
  for (int e = at.start[tile]; e < at.start[tile + 1]; e++)
    for (int chunk = 0; chunk < TILE; chunk += CHUNK) {
      int j = at.other[e] * TILE + chunk;
      __syncthreads();
      stage<D>(ks, k, j, nk);
      stage<D>(vs, v, j, nk);
      __syncthreads();
      for (int c = 0; c < CHUNK && j + c < nk; c++) {
        float s = dot<LANES>(mine, ks[c] + lane * CHANNELS) * scale;
        if (at.bits[e] >= 0 && !sees(bits + at.bits[e] * 512L, row, chunk + c)) continue;
        float higher = fmaxf(top, s), shrink = exp2f(top - higher), p = exp2f(s - higher);
        total = total * shrink + p;
        for (int x = 0; x < CHANNELS; x++) out[x] = out[x] * shrink + p * vs[c][lane * CHANNELS + x];
        top = higher;
      }
    }
  store<D>(o, out, total > 0.f ? 1.f / total : 0.f, i, nq, lane);
  if (lane == 0 && i < nq) lse[(long)blockIdx.y * nq + i] = total > 0.f ? top + log2f(total) : INFINITY;
}

// Both halves of the backward pass. OF_KEYS: rows a, b are k, v of a key tile, and q, do pass by as x, y; else rows are
// q, do of a query tile, and k, v pass by. da takes dS x, and for keys db takes p y.
template <int D, bool OF_KEYS> __global__ void backward(const bf16* a, const bf16* b, const bf16* x, const bf16* y,
    bf16* da, bf16* db, const float* lse, const float* delta, Visits at, const uint32_t* bits, int n, int m,
    float scale, float factor) {
  constexpr int LANES = D / CHANNELS, ROWS = THREADS / LANES;
  __shared__ float xs[CHUNK][D], ys[CHUNK][D];
  int tile = at.order[blockIdx.x / (TILE / ROWS)], lane = threadIdx.x % LANES;
  int row = blockIdx.x % (TILE / ROWS) * ROWS + threadIdx.x / LANES, i = tile * TILE + row;
  float ra[CHANNELS], rb[CHANNELS], ga[CHANNELS] = {}, gb[CHANNELS] = {};
  load<D>(ra, a, i, n, lane);
  load<D>(rb, b, i, n, lane);
  for (int e = at.start[tile]; e < at.start[tile + 1]; e++)
    for (int chunk = 0; chunk < TILE; chunk += CHUNK) {
      int j = at.other[e] * TILE + chunk;
      __syncthreads();
      stage<D>(xs, x, j, m);
      stage<D>(ys, y, j, m);
      __syncthreads();
      for (int c = 0; c < CHUNK && j + c < m; c++) {
        float s = dot<LANES>(ra, xs[c] + lane * CHANNELS) * scale, dp = dot<LANES>(rb, ys[c] + lane * CHANNELS);
        if (i >= n || (at.bits[e] >= 0 && !sees(bits + at.bits[e] * 512L, row, chunk + c))) continue;
        long query = (long)blockIdx.y * (OF_KEYS ? m : n) + (OF_KEYS ? j + c : i);
        float p = exp2f(s - lse[query]), ds = p * (dp - delta[query]);
        for (int z = 0; z < CHANNELS; z++) {
          ga[z] += ds * xs[c][lane * CHANNELS + z];
          if (OF_KEYS) gb[z] += p * ys[c][lane * CHANNELS + z];
        }
      }
    }
  store<D>(da, ga, factor, i, n, lane);
  if (OF_KEYS) store<D>(db, gb, 1.f, i, n, lane);
}

// ---- from the host: each function returns a cudaError ---------------------------------------------------------------

template <int D> dim3 blocks(int n, int heads) { return dim3((n + TILE - 1) / TILE * (TILE * D / CHANNELS / THREADS), heads); }

template <int D> int run(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, Visits at,
                         const uint32_t* bits, int nq, int nk, int heads, float scale, cudaStream_t stream) {
  LAUNCH(forward<D>, blocks<D>(nq, heads), 0, q, k, v, o, lse, at, bits, nq, nk, scale * 1.44269504f);
  return cudaGetLastError();
}

template <int D> int run_back(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,
    const float* delta, bf16* dq, bf16* dk, bf16* dv, Visits by_query, Visits by_key, const uint32_t* bits,
    const uint32_t* bits_t, int nq, int nk, int heads, float scale, cudaStream_t stream) {
  float base2 = scale * 1.44269504f;
  LAUNCH((backward<D, true>), blocks<D>(nk, heads), 0, k, v, q, dout, dk, dv, lse, delta, by_key, bits_t, nk, nq,
         base2, scale);
  LAUNCH((backward<D, false>), blocks<D>(nq, heads), 0, q, dout, k, v, dq, (bf16*)nullptr, lse, delta, by_query, bits,
         nq, nk, base2, scale);
  return cudaGetLastError();
}

#include "entry.cuh"
