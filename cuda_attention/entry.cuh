// What ctypes calls, the same for every version: included behind run<D> and run_back<D>. Each function returns a
// cudaError, or -1 for a head width that is not built.
#pragma once

extern "C" int attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, Visits by_query,
    const uint32_t* bits, int nq, int nk, int heads, int d, float scale, cudaStream_t stream) {
  return d == 64 ? run<64>(q, k, v, o, lse, by_query, bits, nq, nk, heads, scale, stream)
       : d == 128 ? run<128>(q, k, v, o, lse, by_query, bits, nq, nk, heads, scale, stream) : -1;
}

extern "C" int attention_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,
    const float* delta, bf16* dq, bf16* dk, bf16* dv, Visits by_query, Visits by_key, const uint32_t* bits,
    const uint32_t* bits_t, int nq, int nk, int heads, int d, float scale, cudaStream_t stream) {
  auto go = d == 64 ? run_back<64> : d == 128 ? run_back<128> : nullptr;
  return go ? go(q, k, v, dout, lse, delta, dq, dk, dv, by_query, by_key, bits, bits_t, nq, nk, heads, scale, stream) : -1;
}
