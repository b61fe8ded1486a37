/* The number type and its arithmetic: every operation rounds once, to nearest even.
 *
 * TYPE 16: IEEE half (_Float16), 17: bfloat16 (a uint16_t; gcc 12 has no arithmetic for it), 32: float.
 * LANES: numbers of a vector, 1 for the scalar kernels. FUSED 1: multiply-adds round after the sum alone.
 *
 * Compile with -ffp-contract=off and -fexcess-precision=16: without the first a compiler may fuse what is written as
 * two operations, without the second it may keep a half product in float32. number_check() finds both. */
#ifndef NUMBER_H
#define NUMBER_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef LANES
#define LANES 1
#endif
#ifndef FUSED
#define FUSED 0
#endif
#define INLINE static inline __attribute__((always_inline, unused))

INLINE uint32_t float_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
INLINE float bits_float(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
INLINE uint64_t double_bits(double x) { uint64_t b; memcpy(&b, &x, 8); return b; }
INLINE double bits_double(uint64_t b) { double x; memcpy(&x, &b, 8); return x; }

#if TYPE == 16
#if !defined(__FLT16_MAX__)
#error "this compiler has no _Float16 here: gcc 12 or newer on x86-64, or make TYPE=17 (bfloat16) or TYPE=32 (float)"
#endif
typedef _Float16 elem;
typedef uint16_t elem_bits;
INLINE float wide(elem x) { return (float)x; }
INLINE elem narrow(float x) { return (elem)x; }
#elif TYPE == 17
typedef uint16_t elem;
typedef uint16_t elem_bits;
INLINE float wide(elem x) { return bits_float((uint32_t)x << 16); }
INLINE elem narrow(float x) {
  uint32_t b = float_bits(x);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (elem)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
#elif TYPE == 32
typedef float elem;
typedef uint32_t elem_bits;
INLINE float wide(elem x) { return x; }
INLINE elem narrow(float x) { return x; }
#else
#error "TYPE is 16 (half), 17 (bfloat16) or 32 (float)"
#endif

#if TYPE == 17
INLINE elem add(elem a, elem b) { return narrow(wide(a) + wide(b)); }
INLINE elem sub(elem a, elem b) { return narrow(wide(a) - wide(b)); }
INLINE elem mul(elem a, elem b) { return narrow(wide(a) * wide(b)); }
#else
INLINE elem add(elem a, elem b) { elem r = a + b; return r; }
INLINE elem sub(elem a, elem b) { elem r = a - b; return r; }
INLINE elem mul(elem a, elem b) { elem r = a * b; return r; }
#endif
INLINE elem over(elem total, int count) { return narrow(wide(total) / (float)count); }

/* c + a * b with one rounding: double holds the product, and rounding to odd makes a second rounding harmless. */
INLINE elem fused(elem c, elem a, elem b) {
#if TYPE == 32
  return fmaf(a, b, c);
#else
  double product = (double)wide(a) * (double)wide(b), other = (double)wide(c);
  double total = product + other, of_other = total - product;
  double lost = (product - (total - of_other)) + (other - of_other);
  uint64_t bits = double_bits(total);
  if (lost != 0 && isfinite(lost) && !(bits & 1)) total = bits_double((lost > 0) == (total > 0) ? bits + 1 : bits - 1);
  float near = (float)total;
  uint32_t half = float_bits(near);
  if ((double)near != total && isfinite(near) && near != 0 && !(half & 1))
    near = bits_float((total > (double)near) == (near > 0) ? half + 1 : half - 1);
  return narrow(near);
#endif
}
INLINE elem mac(elem c, elem a, elem b) {
#if FUSED
  return fused(c, a, b);
#else
  return add(c, mul(a, b));
#endif
}

/* Vectors. On x86 without AVX512-FP16 gcc takes half vectors apart, so eight of them go through float32 together. */
#if LANES > 1
#if TYPE == 16 && LANES == 8 && !FUSED && defined(__F16C__) && defined(__AVX__) && !defined(__AVX512FP16__)
#include <immintrin.h>
typedef __m128i vec;
INLINE vec vload(const elem *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE void vstore(elem *p, vec v) { _mm_storeu_si128((__m128i *)p, v); }
INLINE vec vsplat(elem x) { elem_bits b; memcpy(&b, &x, 2); return _mm_set1_epi16((short)b); }
INLINE vec vmac(vec c, vec a, vec b) {
  __m128i p = _mm256_cvtps_ph(_mm256_mul_ps(_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_cvtps_ph(_mm256_add_ps(_mm256_cvtph_ps(c), _mm256_cvtph_ps(p)), _MM_FROUND_TO_NEAREST_INT);
}
#elif TYPE == 17 || FUSED
typedef struct { elem at[LANES]; } vec;
INLINE vec vload(const elem *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE void vstore(elem *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec vsplat(elem x) { vec v; for (int l = 0; l < LANES; l++) v.at[l] = x; return v; }
INLINE vec vmac(vec c, vec a, vec b) { for (int l = 0; l < LANES; l++) c.at[l] = mac(c.at[l], a.at[l], b.at[l]); return c; }
#else
typedef elem vec __attribute__((vector_size(LANES * sizeof(elem))));
INLINE vec vload(const elem *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE void vstore(elem *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec vsplat(elem x) { vec v = {0}; for (int l = 0; l < LANES; l++) v[l] = x; return v; }
INLINE vec vmac(vec c, vec a, vec b) { vec p = a * b; vec r = c + p; return r; }
#endif
INLINE elem vsum(vec v) {
  elem at[LANES];
  vstore(at, v);
  elem total = at[0];
  for (int l = 1; l < LANES; l++) total = add(total, at[l]);
  return total;
}
#endif

/* exp and log as a few float operations: no two libraries agree on the last bit of theirs. */
INLINE float exp32(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  float n = floorf(x * 0x1.715476p+0f + 0.5f), r = x - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  float p = 0x1.a01a02p-13f;
  p = p * r + 0x1.6c16c2p-10f;
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0x1p-1f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  return p * bits_float((uint32_t)((int32_t)n + 127) << 23);
}
INLINE float log32(float x) {
  uint32_t bits = float_bits(x);
  int32_t exponent = (int32_t)(bits >> 23) - 127;
  float m = bits_float((bits & 0x7fffff) | 0x3f800000);
  if (m > 0x1.6a09e6p+0f) { m = m * 0.5f; exponent++; }
  float n = (float)exponent, t = (m - 1.0f) / (m + 1.0f), square = t * t;
  float p = 0x1.c71c72p-4f;
  p = p * square + 0x1.24924ap-3f;
  p = p * square + 0x1.99999ap-3f;
  p = p * square + 0x1.555556p-2f;
  p = (p * square) * t + t;
  return n * 0x1.62e4p-1f + (n * 0x1.7f7d1cp-20f + (p + p));
}

/* Whether products round before they are added: (1 + u)(1 - u) - 1 is 0 then, and -u * u where they don't. */
static __attribute__((unused)) int number_check(void) {
#if TYPE == 16
  volatile elem a = (elem)(1.0f + 0x1p-10f), b = (elem)(1.0f - 0x1p-10f), one = (elem)-1.0f;
#elif TYPE == 17
  volatile elem a = narrow(1.0f + 0x1p-7f), b = narrow(1.0f - 0x1p-7f), one = narrow(-1.0f);
#else
  volatile elem a = 1.0f + 0x1p-23f, b = 1.0f - 0x1p-23f, one = -1.0f;
#endif
  int apart = wide(add(one, mul(a, b))) == 0.0f;
#if TYPE != 17
  elem at_once = one + a * b; /* gcc may keep the half product in float32 here, unless -fexcess-precision=16 */
  apart = apart && at_once == 0;
#endif
#if LANES > 1 && !FUSED
  elem lanes[LANES];
  vstore(lanes, vmac(vsplat(one), vsplat(a), vsplat(b)));
  for (int l = 0; l < LANES; l++) apart = apart && wide(lanes[l]) == 0.0f;
#endif
  return apart && wide(fused(one, a, b)) != 0.0f;
}
#endif
