// For processors with products of bfloat16, besides AVX-512, and bytes picked anywhere (VBMI).
#include "common.inc"

#ifdef X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma")
#endif
#ifdef BF16
#define ISA 3
namespace nybble {
namespace {
namespace avx512 {  // whose vectors and scales are used here
#include "packed_body.inc"
}
namespace bfloat16 {
#include "bfloat16.inc"
}
}  // namespace
Part pick_of_bfloat16(const Weight& w) { return bfloat16::pick(w); }
void arrange_of_bfloat16(const Weight& w, const void* x, int64_t dtype, int64_t m, int64_t stride, uint16_t* to) {
    bfloat16::arrange(w, x, dtype, m, stride, to);
}
}  // namespace nybble
#endif
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
