// For processors with AVX-512.
#include "common.inc"

#ifdef X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define ISA 3
namespace nybble {
namespace {
#include "packed_body.inc"
#include "inputs_body.inc"
#include "decoder_body.inc"
#include "step_body.inc"
#include "draws_body.inc"
}  // namespace
const Set avx512_set = {pick, pick_nibbles, round_blocks, step_chunk, maxima_of, next_words, tempered, &math};
}  // namespace nybble
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
