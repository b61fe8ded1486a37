// Products of whole numbers for processors with AVX2 and AVX-VNNI.
#include "whole.inc"

#ifdef AVXVNNI
#ifdef X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#endif
#define ISA 2
#define VNNI 1
namespace nybble {
namespace {
#include "integers_body.inc"
}  // namespace
const Functions whole_avxvnni = functions;
}  // namespace nybble
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif
