// Products of small integers in one block, exact or wrong, with every form of box and operand that
// hopper.cu uses. On a GPU they show whether hopper.cuh means what emulate.h takes it to mean: run
// them before any kernel (python -m experiments.attention).
//
//   s (128 x M) = a b^T      a (128 x D) and b (M x D) in shared memory, K-major
//   o (128 x D) = p b        p (128 x M) in registers, b MN-major: at D = 128 it lies in two boxes
//
// a and b are the rows from row_a and row_b of one head of x (n, heads, D); rows after the last are
// zeros.
#ifdef EMULATED                  // on a CPU, for tests
#include "emulate.h"
#else
#include "hopper.cuh"
#endif

constexpr int ROWS = 128, THREADS = 256;                             // two warpgroups of 64 rows

template <int D, int M> struct Shared {
  bf16 a[D / 64][ROWS][64], b[D / 64][M][64];
  uint64_t full;
};

template <int D, int M>
__global__ void __launch_bounds__(THREADS, 1)
products(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
         const bf16* p, float* s, float* o, int head, int row_a, int row_b) {
  SHARED_MEMORY(memory);
  uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024;
  auto& mem = *reinterpret_cast<Shared<D, M>*>(start);
  int group = threadIdx.x / 128, row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  int column = threadIdx.x % 4 * 2;
  if (threadIdx.x == 0) {
    barrier_init(&mem.full, 1);
    barrier_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(&mem.full, sizeof(mem.a) + sizeof(mem.b));
    for (int box = 0; box < D / 64; box++) {
      copy_box(mem.a[box], &map_a, box * 64, head, row_a, &mem.full);
      copy_box(mem.b[box], &map_b, box * 64, head, row_b, &mem.full);
    }
  }

  uint32_t p_registers[M / 4];
  float ab[M / 2], pb[D / 2] = {};
  for (int i = 0; i < M / 4; i++) {
    const bf16* at = p + (row + i % 2 * 8) * M + i / 2 * 8 + column;
    p_registers[i] = *reinterpret_cast<const uint32_t*>(at);
  }
  barrier_wait(&mem.full, 0);
  wgmma_fence();
  for (int k = 0; k < D / 16; k++)
    wgmma<M, false>(ab, descriptor(&mem.a[k / 4][64 * group][k % 4 * 16], 0),
                    descriptor(&mem.b[k / 4][0][k % 4 * 16], 0), k > 0);
  for (int k = 0; k < M / 16; k++)
    wgmma<D, true>(pb, &p_registers[4 * k], descriptor(&mem.b[0][16 * k][0], sizeof(mem.b[0])), 1);
  wgmma_commit();
  wgmma_wait<0>();
  wait_registers(ab);
  wait_registers(pb);
  for (int i = 0; i < M / 2; i++)
    s[(row + i / 2 % 2 * 8) * M + i / 4 * 8 + column + i % 2] = ab[i];
  for (int i = 0; i < D / 2; i++)
    o[(row + i / 2 % 2 * 8) * D + i / 4 * 8 + column + i % 2] = pb[i];
}

template <int D, int M>
int run(const bf16* x, const bf16* p, float* s, float* o, int n, int heads, int head, int row_a,
        int row_b, cudaStream_t stream) {
  CUtensorMap map_a, map_b;
  int bytes = sizeof(Shared<D, M>) + 1024;
  int code = make_map(&map_a, x, n, heads, D, ROWS);
  if (!code) code = make_map(&map_b, x, n, heads, D, M);
  if (!code)
    code = cudaFuncSetAttribute(products<D, M>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code) return code;
  LAUNCH((products<D, M>), dim3(1), bytes, map_a, map_b, p, s, o, head, row_a, row_b);
  return cudaGetLastError();
}

// Returns a cudaError, or -1 for sizes that hopper.cu does not use.
extern "C" int descriptor_products(const bf16* x, const bf16* p, float* s, float* o, int n,
                                   int heads, int d, int m, int head, int row_a, int row_b,
                                   cudaStream_t stream) {
  auto f = d == 64 && m == 64 ? run<64, 64> : d == 64 && m == 128 ? run<64, 128>
         : d == 128 && m == 64 ? run<128, 64> : d == 128 && m == 128 ? run<128, 128> : nullptr;
  return f ? f(x, p, s, o, n, heads, head, row_a, row_b, stream) : -1;
}
