// v1: masked attention on Hopper's tensor cores (sm_90a). Tiles, bits and lse are those of tiles.py and blockwise.py.
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

template <int D> using Tile = bf16[D / 64][TILE][64];                    // 64-column boxes
template <int D> constexpr int BYTES = sizeof(Tile<D>);

template <int D> __device__ inline void copy_tile(Tile<D>& to, const CUtensorMap* x, int tile, uint64_t* full) {
  for (int box = 0; box < D / 64; box++) copy_box(to[box], x, box * 64, blockIdx.y, tile * TILE, full);
}

// s (64 x 128) = rows 64 w .. of a times all rows of b, transposed: both K-major.
template <int D> __device__ inline void scores(float (&s)[64], const Tile<D>& a, const Tile<D>& b, int w) {
  for (int k = 0; k < D / 16; k++)
    wgmma<128, false>(s, descriptor(&a[k / 4][64 * w][k % 4 * 16], 0), descriptor(&b[k / 4][0][k % 4 * 16], 0), k > 0);
}

// out (64 x D) += p (64 x 128, in registers) times b (128 x D).
template <int D> __device__ inline void times(float (&out)[D / 2], const uint32_t (&p)[32], const Tile<D>& b) {
  for (int k = 0; k < TILE / 16; k++)
    wgmma<D, true>(out, &p[4 * k], descriptor(&b[0][16 * k][0], sizeof(b[0])), 1);
}

// Accumulator elements 4 i + 2 r + c are row u + 8 r, column 8 i + 2 x + c: as operands, pairs of columns.
__device__ inline void to_operand(uint32_t (&p)[32], const float (&s)[64]) {
  for (int i = 0; i < 32; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

__device__ inline float over_row(float x, bool maximum) {                // the four lanes that share a row
  for (int lane = 1; lane < 4; lane *= 2) {
    float other = __shfl_xor_sync(0xffffffff, x, lane);
    x = maximum ? fmaxf(x, other) : x + other;
  }
  return x;
}

template <int D> struct Shared {
  Tile<D> q, k[STAGES], v[STAGES];
  uint64_t full_q, full_k[STAGES], full_v[STAGES], empty[STAGES];
};

template <int D> __global__ void __launch_bounds__(THREADS, 1)
forward(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
        bf16* o, float* lse, Visits at, const uint2* bits, int nq, float scale) {
  SHARED_MEMORY(memory);
  Shared<D>& mem = *reinterpret_cast<Shared<D>*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
  int tile = at.order[blockIdx.x], first = at.start[tile], count = at.start[tile + 1] - first;
  int group = threadIdx.x / 128, me = threadIdx.x % 128;
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
    if (me == 0) {
      barrier_expect(&mem.full_q, BYTES<D>);
      copy_tile<D>(mem.q, &q, tile, &mem.full_q);
      for (int e = 0; e < count; e++) {
        int stage = e % STAGES, other = at.other[first + e];
        if (e >= STAGES) barrier_wait(&mem.empty[stage], e / STAGES % 2 ^ 1);
        barrier_expect(&mem.full_k[stage], BYTES<D>);
        copy_tile<D>(mem.k[stage], &k, other, &mem.full_k[stage]);
        barrier_expect(&mem.full_v[stage], BYTES<D>);
        copy_tile<D>(mem.v[stage], &v, other, &mem.full_v[stage]);
      }
    }
    return;
  }

  more_registers<240>();
  float out[D / 2] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  if (count) barrier_wait(&mem.full_q, 0);
  for (int e = 0; e < count; e++) {
    int stage = e % STAGES, parity = e / STAGES % 2, number = at.bits[first + e];
    uint2 seen = number < 0 ? make_uint2(~0u, ~0u) : bits[number * 256L + threadIdx.x];
    float s[64];
    barrier_wait(&mem.full_k[stage], parity);
    wgmma_fence();
    scores<D>(s, mem.q, mem.k[stage], group);
    wgmma_commit();
    wgmma_wait<0>();
    if (number >= 0)
      for (int i = 0; i < 64; i++)
        if (!((i < 32 ? seen.x : seen.y) >> i % 32 & 1)) s[i] = -INFINITY;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float higher = top[r];
      for (int i = 0; i < 64; i++)
        if (i / 2 % 2 == r) higher = fmaxf(higher, s[i]);
      higher = over_row(higher, true);
      float base = higher == -INFINITY ? 0.f : higher * scale, sum = 0.f;      // -inf minus -inf is no number
      float shrink = exp2_fast(top[r] * scale - base);
      for (int i = 0; i < 64; i++)
        if (i / 2 % 2 == r) sum += s[i] = exp2_fast(s[i] * scale - base);
      total[r] = total[r] * shrink + sum;
      for (int i = 0; i < D / 2; i++)
        if (i / 2 % 2 == r) out[i] *= shrink;
      top[r] = higher;
    }
    uint32_t p[32];
    to_operand(p, s);
    barrier_wait(&mem.full_v[stage], parity);
    wgmma_fence();
    times<D>(out, p, mem.v[stage]);
    wgmma_commit();
    wgmma_wait<0>();
    barrier_arrive(&mem.empty[stage]);
  }

#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = over_row(total[r], false), factor = sum > 0.f ? 1.f / sum : 0.f;
    int row = tile * TILE + 64 * group + me / 32 * 16 + me % 32 / 4 + 8 * r;
    if (row >= nq) continue;
    uint32_t* to = reinterpret_cast<uint32_t*>(o + ((long)row * gridDim.y + blockIdx.y) * D) + me % 4;
    for (int i = 0; i < D / 8; i++) to[4 * i] = pack(out[4 * i + 2 * r] * factor, out[4 * i + 2 * r + 1] * factor);
    if (me % 4 == 0) lse[(long)blockIdx.y * nq + row] = sum > 0.f ? top[r] * scale + log2f(sum) : INFINITY;
  }
}

// ---- called through ctypes: returns a cudaError, or -1 for a head width that is not built -----------------------------

template <int D> int run(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, Visits at, const uint32_t* bits,
                         int nq, int nk, int heads, float scale, cudaStream_t stream) {
  CUtensorMap mq, mk, mv;
  if (int code = make_map(&mq, q, nq, heads, D, TILE)) return code;
  if (int code = make_map(&mk, k, nk, heads, D, TILE)) return code;
  if (int code = make_map(&mv, v, nk, heads, D, TILE)) return code;
  int bytes = sizeof(Shared<D>) + 1024;
  if (int code = cudaFuncSetAttribute(forward<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return code;
  LAUNCH(forward<D>, dim3((nq + TILE - 1) / TILE, heads), bytes, mq, mk, mv, o, lse, at, (const uint2*)bits, nq,
         scale * 1.44269504f);
  return cudaGetLastError();
}

extern "C" int attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, Visits by_query,
    const uint32_t* bits, int nq, int nk, int heads, int d, float scale, cudaStream_t stream) {
  return d == 64 ? run<64>(q, k, v, o, lse, by_query, bits, nq, nk, heads, scale, stream)
       : d == 128 ? run<128>(q, k, v, o, lse, by_query, bits, nq, nk, heads, scale, stream) : -1;
}
