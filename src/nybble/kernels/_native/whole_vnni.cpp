// Products of whole numbers for processors with AVX-512 VNNI.
#include "whole.inc"

#ifdef X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2")
#endif
#define ISA 3
#define VNNI 1
namespace nybble {
namespace {
#include "integers_body.inc"
}  // namespace
const Functions whole_vnni = functions;
}  // namespace nybble
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
