// For processors with AVX2 and FMA.
#include "common.inc"

#ifdef X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA 2
namespace nybble {
namespace {
#include "packed_body.inc"
#include "inputs_body.inc"
#include "decoder_body.inc"
#include "step_body.inc"
#include "draws_body.inc"
}  // namespace
const Set avx2_set = {pick, nullptr, round_blocks, step_chunk, maxima_of, next_words, tempered, &math};
}  // namespace nybble
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
