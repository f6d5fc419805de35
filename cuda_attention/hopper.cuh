// Hopper's instructions, one function each: barriers in shared memory, TMA copies, WGMMA products.
//
// Tiles of bf16 lie in shared memory as boxes of 64 columns: rows of 128 bytes, whose 16-byte
// pieces are permuted by the row (128-byte swizzle); 8 rows take 1024 bytes. TMA writes this form
// and WGMMA reads it through 64-bit descriptors:
//   K-major operand (rows x 16 of k)      start + 32 bytes a step of k; 8 rows are 1024 bytes
//   MN-major operand (16 of k x columns)  start + 2048 bytes a step of k; 64 columns are one box
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

#define LAUNCH(kernel, grid, bytes, ...) kernel<<<grid, THREADS, bytes, stream>>>(__VA_ARGS__)
#define SHARED_MEMORY(name) extern __shared__ uint8_t name[]

__device__ inline uint32_t address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- Barriers ---------------------------------------------------------------------------------

__device__ inline void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(arrivals));
}
__device__ inline void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and makes the phase wait for `bytes` of copies.
__device__ inline void barrier_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(address(b)), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory");
}
// Waits until the phase of this parity is over.
__device__ inline void barrier_wait(uint64_t* b, int parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra WAIT;\nDONE:\n}"
      ::"r"(address(b)), "r"(parity) : "memory");
}

// ---- Copies -----------------------------------------------------------------------------------

// A box of 64 columns from (column, head, row) of x (n, heads, D); rows after the last are zeros.
__device__ inline void copy_box(void* to, const CUtensorMap* x, int column, int head, int row,
                                uint64_t* b) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(address(to)), "l"(x), "r"(address(b)), "r"(column), "r"(head), "r"(row) : "memory");
}

// A map of x (n, heads, D) with boxes of 64 columns of a head and `rows` rows. Returns a cudaError.
inline int make_map(CUtensorMap* map, const bf16* x, int n, int heads, int d, int rows) {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  if (!encode) {
    cudaDriverEntryPointQueryResult found;
    int code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000,
                                                cudaEnableDefault, &found);
    if (code) return code;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  }
  cuuint64_t sizes[] = {(cuuint64_t)d, (cuuint64_t)heads, (cuuint64_t)n};
  cuuint64_t strides[] = {(cuuint64_t)d * 2, (cuuint64_t)heads * d * 2};
  cuuint32_t box[] = {64, 1, (cuuint32_t)rows}, steps[] = {1, 1, 1};
  int code = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void*)x, sizes, strides, box, steps,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code ? cudaErrorInvalidValue : cudaSuccess;
}

// ---- Products ---------------------------------------------------------------------------------

// stride: bytes between boxes of an MN-major operand; unused by a K-major one.
__device__ inline uint64_t descriptor(const void* start, int stride) {
  return (address(start) & 0x3ffff) >> 4 | (uint64_t)(stride >> 4) << 16 |
         (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT> __device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// After a wait: the compiler must not move a read of these registers before it.
template <int N> __device__ inline void wait_registers(float (&d)[N]) {
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> __device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ inline void less_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// The 32 or 64 accumulator registers of a product, as operands of asm and by number.
#define D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(d, i) D4(d, i), D4(d, i + 4), D4(d, i + 8), D4(d, i + 12)
#define D32(d, i) D16(d, i), D16(d, i + 16)
#define R32                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64 R32 ", "                                                                 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (64 x N a warpgroup) = a b + (add ? d : 0) over 16 of k; a and b in shared memory.
// B_MN: b is MN-major.
template <int N, bool B_MN>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
  if constexpr (N == 128)
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{" R64 "}, %64, %65, p, 1, 1, 0, %67;\n}"
                 : D32(d, 0), D32(d, 32) : "l"(a), "l"(b), "r"(add), "n"(B_MN));
  else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{" R32 "}, %32, %33, p, 1, 1, 0, %35;\n}"
                 : D32(d, 0) : "l"(a), "l"(b), "r"(add), "n"(B_MN));
}

// The same with a in registers: pairs of bf16 of rows u and u + 8, at columns 2 x, then 8 + 2 x.
template <int N, bool B_MN>
__device__ inline void wgmma(float (&d)[N / 2], const uint32_t* a, uint64_t b, int add) {
  if constexpr (N == 128)
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{" R64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
                 : D32(d, 0), D32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(B_MN));
  else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{" R32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
                 : D32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(B_MN));
}

__device__ inline uint32_t pack(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
