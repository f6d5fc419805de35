// The functions that ctypes calls, for plain.cu and hopper.cu: included after run<D> and
// run_backward<D>. Each returns a cudaError, or -1 for a head width that is not built.
#pragma once

extern "C" int attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse,
                                 Visits row_tiles, const uint32_t* bits, int nq, int nk, int heads,
                                 int d, float scale, cudaStream_t stream) {
  auto f = d == 64 ? run<64> : d == 128 ? run<128> : nullptr;
  return f ? f(q, k, v, o, lse, row_tiles, bits, nq, nk, heads, scale, stream) : -1;
}

extern "C" int attention_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* dout,
                                  const float* lse, const float* delta, bf16* dq, bf16* dk,
                                  bf16* dv, Visits row_tiles, Visits column_tiles,
                                  const uint32_t* bits, const uint32_t* bits_t, int nq, int nk,
                                  int heads, int d, float scale, cudaStream_t stream) {
  auto f = d == 64 ? run_backward<64> : d == 128 ? run_backward<128> : nullptr;
  return f ? f(q, k, v, dout, lse, delta, dq, dk, dv, row_tiles, column_tiles, bits, bits_t, nq, nk,
               heads, scale, stream) : -1;
}
