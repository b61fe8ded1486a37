/* Kernels of a training step over tensors of one sample, CHW. Rows of a product, or its columns, are split over cores.
 * UNROLL: outputs, or vectors of outputs, that a kernel calculates side by side; it changes no result. */
#ifndef KERNELS_H
#define KERNELS_H
#include "number.h"
#ifndef UNROLL
#define UNROLL 1
#endif
#ifndef CORES
#define CORES 1
#endif
#define STRING(x) #x
#define PRAGMA(x) _Pragma(STRING(x))
/* Over cores, where there is more to do than waking them costs. */
#if CORES > 1
#define SPLIT(work) PRAGMA(omp parallel for num_threads(CORES) schedule(static) if ((work) > 32768))
#else
#define SPLIT(work)
#endif
#define EACH_UNROLLED PRAGMA(GCC unroll UNROLL) for (int u = 0; u < UNROLL; u++)
#define KERNEL static __attribute__((unused, noinline))

typedef struct {
  int ci, hi, wi, co, ho, wo, hk, wk, down, across, up, left, groups;
} conv_shape;

/* C[j] = sum over k of A[k] B[k * ld + j], first <= j < end: lanes hold different j, and each sums in the order of k. */
KERNEL void row_across(const elem *A, const elem *B, elem *C, int K, int ld, int first, int end) {
  int j = first;
#if LANES > 1
  for (; j + LANES * UNROLL <= end; j += LANES * UNROLL) {
    vec total[UNROLL];
    EACH_UNROLLED total[u] = vsplat(narrow(0));
    for (int k = 0; k < K; k++) {
      vec a = vsplat(A[k]);
      EACH_UNROLLED total[u] = vmac(total[u], a, vload(B + (long)k * ld + j + u * LANES));
    }
    EACH_UNROLLED vstore(C + j + u * LANES, total[u]);
  }
#else
  for (; j + UNROLL <= end; j += UNROLL) {
    elem total[UNROLL];
    EACH_UNROLLED total[u] = narrow(0);
    for (int k = 0; k < K; k++) {
      EACH_UNROLLED total[u] = mac(total[u], A[k], B[(long)k * ld + j + u]);
    }
    EACH_UNROLLED C[j + u] = total[u];
  }
#endif
  for (; j < end; j++) {
    elem total = narrow(0);
    for (int k = 0; k < K; k++) total = mac(total, A[k], B[(long)k * ld + j]);
    C[j] = total;
  }
}

/* C[j] = sum over k of A[k] B[j * K + k]: k goes to lane k % LANES, the rest to a scalar; the lanes are added to that. */
#if LANES > 1
#define ALONG(COUNT)                                                                      \
  {                                                                                       \
    vec lanes[COUNT];                                                                     \
    elem left[COUNT];                                                                     \
    int k = 0;                                                                            \
    for (int u = 0; u < COUNT; u++) lanes[u] = vsplat(narrow(0)), left[u] = narrow(0);    \
    for (; k + LANES <= K; k += LANES) {                                                  \
      vec a = vload(A + k);                                                               \
      for (int u = 0; u < COUNT; u++) lanes[u] = vmac(lanes[u], a, vload(B + (long)(j + u) * K + k)); \
    }                                                                                     \
    for (; k < K; k++)                                                                    \
      for (int u = 0; u < COUNT; u++) left[u] = mac(left[u], A[k], B[(long)(j + u) * K + k]); \
    for (int u = 0; u < COUNT; u++) C[j + u] = add(left[u], vsum(lanes[u]));              \
  }
#else
#define ALONG(COUNT)                                                                      \
  {                                                                                       \
    elem total[COUNT];                                                                    \
    for (int u = 0; u < COUNT; u++) total[u] = narrow(0);                                 \
    for (int k = 0; k < K; k++)                                                           \
      for (int u = 0; u < COUNT; u++) total[u] = mac(total[u], A[k], B[(long)(j + u) * K + k]); \
    for (int u = 0; u < COUNT; u++) C[j + u] = total[u];                                  \
  }
#endif
KERNEL void row_along(const elem *A, const elem *B, elem *C, int K, int first, int end) {
  int j = first;
  for (; j + UNROLL <= end; j += UNROLL) ALONG(UNROLL)
#if UNROLL > 1
  for (; j < end; j++) ALONG(1)
#endif
}

/* C[N][M] = A[N][K] B[K][M]; B is [M][K] where it is transposed. */
KERNEL void mm(const elem *A, const elem *B, elem *C, int N, int K, int M, int transposed) {
  int parts = N < CORES ? CORES : 1, size = (M + parts - 1) / parts;
  SPLIT((long)N * K * M)
  for (int part = 0; part < N * parts; part++) {
    int i = part / parts, first = part % parts * size, end = first + size < M ? first + size : M;
    if (transposed) row_along(A + (long)i * K, B, C + (long)i * M, K, first, end);
    else row_across(A + (long)i * K, B, C + (long)i * M, K, M, first, end);
  }
}

KERNEL void copy(const elem *x, elem *y, int n) { memcpy(y, x, (size_t)n * sizeof(elem)); }
KERNEL void accumulate(elem *total, const elem *x, int n) { for (int i = 0; i < n; i++) total[i] = add(total[i], x[i]); }
KERNEL void add_forward(const elem *a, const elem *b, elem *y, int n) { for (int i = 0; i < n; i++) y[i] = add(a[i], b[i]); }
KERNEL void add_bias(elem *y, const elem *bias, int rows, int columns) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) y[i * columns + j] = add(y[i * columns + j], bias[i]);
}
KERNEL void row_sums(const elem *x, elem *y, int rows, int columns) {
  for (int i = 0; i < rows; i++) {
    elem total = narrow(0);
    for (int j = 0; j < columns; j++) total = add(total, x[i * columns + j]);
    y[i] = total;
  }
}
KERNEL void transpose(const elem *x, elem *y, int rows, int columns) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) y[j * rows + i] = x[i * columns + j];
}

/* Rows of what each step of the kernel sees: [ho * wo][channels * hk * wk]. */
KERNEL void im2row(const conv_shape *s, const elem *x, elem *rows) {
  int channels = s->ci / s->groups, width = channels * s->hk * s->wk;
  SPLIT((long)s->ho * s->wo * width)
  for (int step = 0; step < s->ho * s->wo; step++) {
    int top = step / s->wo * s->down - s->up, side = step % s->wo * s->across - s->left;
    elem *row = rows + (long)step * width;
    for (int c = 0; c < channels; c++)
      for (int i = 0; i < s->hk; i++)
        for (int j = 0; j < s->wk; j++) {
          int r = top + i, q = side + j, in = r >= 0 && r < s->hi && q >= 0 && q < s->wi;
          *row++ = in ? x[((long)c * s->hi + r) * s->wi + q] : narrow(0);
        }
  }
}
/* Rows of the gradients that each pixel of the input was part of: [hi * wi][channels * hk * wk], for flipped taps. */
KERNEL void im2row_of_gradient(const conv_shape *s, const elem *dy, elem *rows) {
  int channels = s->co / s->groups, width = channels * s->hk * s->wk;
  SPLIT((long)s->hi * s->wi * width)
  for (int pixel = 0; pixel < s->hi * s->wi; pixel++) {
    int top = pixel / s->wi + s->up - s->hk + 1, side = pixel % s->wi + s->left - s->wk + 1;
    elem *row = rows + (long)pixel * width;
    for (int c = 0; c < channels; c++)
      for (int i = 0; i < s->hk; i++)
        for (int j = 0; j < s->wk; j++) {
          int r = top + i, q = side + j;
          int in = r >= 0 && q >= 0 && r % s->down == 0 && q % s->across == 0 && r / s->down < s->ho && q / s->across < s->wo;
          *row++ = in ? dy[((long)c * s->ho + r / s->down) * s->wo + q / s->across] : narrow(0);
        }
  }
}
/* [co][ci][hk][wk] -> [ci][co][hk][wk], taps flipped. */
KERNEL void block_transpose(const conv_shape *s, const elem *w, elem *turned) {
  int co = s->co / s->groups, ci = s->ci / s->groups, taps = s->hk * s->wk;
  for (int o = 0; o < co; o++)
    for (int i = 0; i < ci; i++)
      for (int t = 0; t < taps; t++) turned[((long)i * co + o) * taps + taps - 1 - t] = w[((long)o * ci + i) * taps + t];
}

KERNEL void conv_forward(const conv_shape *s, const elem *x, const elem *w, elem *y, elem *columns) {
  int co = s->co / s->groups, ci = s->ci / s->groups, width = ci * s->hk * s->wk, steps = s->ho * s->wo;
  for (int g = 0; g < s->groups; g++) {
    im2row(s, x + (long)g * ci * s->hi * s->wi, columns);
    mm(w + (long)g * co * width, columns, y + (long)g * co * steps, co, width, steps, 1);
  }
}
KERNEL void conv_weight(const conv_shape *s, const elem *x, const elem *dy, elem *dw, elem *columns) {
  int co = s->co / s->groups, ci = s->ci / s->groups, width = ci * s->hk * s->wk, steps = s->ho * s->wo;
  for (int g = 0; g < s->groups; g++) {
    im2row(s, x + (long)g * ci * s->hi * s->wi, columns);
    mm(dy + (long)g * co * steps, columns, dw + (long)g * co * width, co, steps, width, 0);
  }
}
KERNEL void conv_input(const conv_shape *s, const elem *w, const elem *dy, elem *dx, elem *columns, elem *turned) {
  int co = s->co / s->groups, ci = s->ci / s->groups, taps = s->hk * s->wk, pixels = s->hi * s->wi;
  for (int g = 0; g < s->groups; g++) {
    block_transpose(s, w + (long)g * co * ci * taps, turned);
    im2row_of_gradient(s, dy + (long)g * co * s->ho * s->wo, columns);
    mm(turned, columns, dx + (long)g * ci * pixels, ci, co * taps, pixels, 1);
  }
}

#define EACH(n) for (int i = 0; i < (n); i++)
KERNEL void relu_forward(const elem *x, elem *y, int n) { EACH(n) y[i] = wide(x[i]) > 0 ? x[i] : narrow(0); }
KERNEL void relu_input(const elem *x, const elem *dy, elem *dx, int n) { EACH(n) dx[i] = wide(x[i]) > 0 ? dy[i] : narrow(0); }
KERNEL void relu6_forward(const elem *x, elem *y, int n) {
  EACH(n) y[i] = wide(x[i]) > 0 ? wide(x[i]) < 6 ? x[i] : narrow(6) : narrow(0);
}
KERNEL void relu6_input(const elem *x, const elem *dy, elem *dx, int n) {
  EACH(n) dx[i] = wide(x[i]) > 0 && wide(x[i]) < 6 ? dy[i] : narrow(0);
}
KERNEL void leaky_relu_forward(const elem *x, elem *y, int n, elem slope) { EACH(n) y[i] = wide(x[i]) > 0 ? x[i] : mul(x[i], slope); }
KERNEL void leaky_relu_input(const elem *x, const elem *dy, elem *dx, int n, elem slope) {
  EACH(n) dx[i] = wide(x[i]) > 0 ? dy[i] : mul(dy[i], slope);
}
KERNEL void sigmoid_forward(const elem *x, elem *y, int n) { EACH(n) y[i] = narrow(1.0f / (exp32(-wide(x[i])) + 1.0f)); }
KERNEL void sigmoid_input(const elem *y, const elem *dy, elem *dx, int n) {
  EACH(n) dx[i] = mul(dy[i], mul(y[i], sub(narrow(1), y[i])));
}
INLINE float gelu_tanh(float x) {
  float inner = (x * x * x * 0x1.6e4e26p-5f + x) * 0x1.988454p-1f;
  return 1.0f - 2.0f / (exp32(inner + inner) + 1.0f);
}
KERNEL void gelu_forward(const elem *x, elem *y, int n) {
  EACH(n) y[i] = narrow(wide(x[i]) * 0.5f * (gelu_tanh(wide(x[i])) + 1.0f));
}
KERNEL void gelu_input(const elem *x, const elem *dy, elem *dx, int n) {
  EACH(n) {
    float v = wide(x[i]), t = gelu_tanh(v), inner = (v * v * 0x1.12ba9ep-3f + 1.0f) * 0x1.988454p-1f;
    dx[i] = mul(dy[i], narrow((t + 1.0f) * 0.5f + v * 0.5f * (1.0f - t * t) * inner));
  }
}

/* Mean, and 1 / sqrt(variance + eps), of a channel. */
INLINE void moments(const elem *x, int pixels, float eps, elem *mean, elem *scale) {
  elem total = narrow(0), squares = narrow(0);
  EACH(pixels) total = add(total, x[i]);
  *mean = over(total, pixels);
  EACH(pixels) { elem c = sub(x[i], *mean); squares = mac(squares, c, c); }
  *scale = narrow(1.0f / sqrtf(wide(over(squares, pixels)) + eps));
}
INLINE void norm_sums(const elem *x, const elem *dy, int pixels, elem mean, elem scale, elem *weight, elem *bias) {
  *weight = *bias = narrow(0);
  EACH(pixels) { *weight = mac(*weight, dy[i], mul(sub(x[i], mean), scale)); *bias = add(*bias, dy[i]); }
}
KERNEL void norm_forward(const elem *x, const elem *weight, const elem *bias, elem *y, int channels, int pixels, float eps) {
  SPLIT((long)channels * pixels * 3)
  for (int c = 0; c < channels; c++) {
    elem mean, scale;
    moments(x + c * pixels, pixels, eps, &mean, &scale);
    for (int i = c * pixels; i < (c + 1) * pixels; i++) {
      elem normal = mul(sub(x[i], mean), scale);
      y[i] = weight ? mac(bias[c], weight[c], normal) : normal;
    }
  }
}
KERNEL void norm_weight(const elem *x, const elem *dy, elem *weight, elem *bias, int channels, int pixels, float eps) {
  SPLIT((long)channels * pixels * 3)
  for (int c = 0; c < channels; c++) {
    elem mean, scale;
    moments(x + c * pixels, pixels, eps, &mean, &scale);
    norm_sums(x + c * pixels, dy + c * pixels, pixels, mean, scale, weight + c, bias + c);
  }
}
KERNEL void norm_input(const elem *x, const elem *weight, const elem *dy, elem *dx, int channels, int pixels, float eps) {
  SPLIT((long)channels * pixels * 6)
  for (int c = 0; c < channels; c++) {
    elem mean, scale, of_weight, of_bias;
    moments(x + c * pixels, pixels, eps, &mean, &scale);
    norm_sums(x + c * pixels, dy + c * pixels, pixels, mean, scale, &of_weight, &of_bias);
    of_weight = over(of_weight, pixels), of_bias = over(of_bias, pixels);
    elem whole = weight ? mul(weight[c], scale) : scale;
    for (int i = c * pixels; i < (c + 1) * pixels; i++) {
      elem normal = mul(sub(x[i], mean), scale);
      dx[i] = mul(whole, sub(sub(dy[i], of_bias), mul(normal, of_weight)));
    }
  }
}

KERNEL void average_forward(const elem *x, elem *y, int channels, int ho, int wo, int high, int across) {
  int width = wo * across;
  for (int c = 0; c < channels; c++)
    for (int r = 0; r < ho; r++)
      for (int q = 0; q < wo; q++) {
        elem total = narrow(0);
        for (int i = 0; i < high; i++)
          for (int j = 0; j < across; j++) total = add(total, x[((long)c * ho * high + r * high + i) * width + q * across + j]);
        y[((long)c * ho + r) * wo + q] = over(total, high * across);
      }
}
KERNEL void average_input(const elem *dy, elem *dx, int channels, int ho, int wo, int high, int across) {
  int width = wo * across, height = ho * high;
  for (int c = 0; c < channels; c++)
    for (int r = 0; r < height; r++)
      for (int q = 0; q < width; q++)
        dx[((long)c * height + r) * width + q] = over(dy[((long)c * ho + r / high) * wo + q / across], high * across);
}
KERNEL void max_forward(const conv_shape *s, const elem *x, elem *y, uint8_t *places) {
  for (int c = 0; c < s->ci; c++)
    for (int step = 0; step < s->ho * s->wo; step++) {
      int top = step / s->wo * s->down - s->up, side = step % s->wo * s->across - s->left, best = -1;
      elem most = narrow(0);
      for (int p = 0; p < s->hk * s->wk; p++) {
        int r = top + p / s->wk, q = side + p % s->wk;
        if (r < 0 || r >= s->hi || q < 0 || q >= s->wi) continue;
        elem v = x[((long)c * s->hi + r) * s->wi + q];
        if (best < 0 || wide(v) > wide(most)) best = p, most = v;
      }
      places[c * s->ho * s->wo + step] = (uint8_t)best;
      y[c * s->ho * s->wo + step] = most;
    }
}
KERNEL void max_input(const conv_shape *s, const uint8_t *places, const elem *dy, elem *dx) {
  EACH(s->ci * s->hi * s->wi) dx[i] = narrow(0);
  for (int c = 0; c < s->ci; c++)
    for (int step = 0; step < s->ho * s->wo; step++) {
      int p = places[c * s->ho * s->wo + step];
      int r = step / s->wo * s->down - s->up + p / s->wk, q = step % s->wo * s->across - s->left + p % s->wk;
      elem *at = dx + ((long)c * s->hi + r) * s->wi + q;
      *at = add(*at, dy[c * s->ho * s->wo + step]);
    }
}

/* Losses in float32; the gradient is rounded once. Each gives the loss. */
KERNEL float loss_cross_entropy(const elem *y, const float *target, elem *dy, float *powers, int n) {
  float highest = wide(y[0]), total = 0, loss = 0;
  EACH(n) highest = wide(y[i]) > highest ? wide(y[i]) : highest;
  EACH(n) { powers[i] = exp32(wide(y[i]) - highest); total += powers[i]; }
  float whole = log32(total) + highest;
  EACH(n) { loss += target[i] * (whole - wide(y[i])); dy[i] = narrow(powers[i] / total - target[i]); }
  return loss;
}
KERNEL float loss_mse(const elem *y, const float *target, elem *dy, float *errors, int n) {
  float loss = 0, by = 2.0f / (float)n;
  EACH(n) { errors[i] = wide(y[i]) - target[i]; loss += errors[i] * errors[i]; dy[i] = narrow(errors[i] * by); }
  return loss / (float)n;
}
KERNEL float loss_l1(const elem *y, const float *target, elem *dy, float *errors, int n) {
  float loss = 0;
  EACH(n) { errors[i] = wide(y[i]) - target[i]; loss += fabsf(errors[i]); dy[i] = narrow((errors[i] < 0 ? -1.0f : 1.0f) / (float)n); }
  return loss / (float)n;
}
KERNEL float loss_berhu(const elem *y, const float *target, elem *dy, float *errors, int n) {
  float loss = 0, most = 0;
  EACH(n) { errors[i] = wide(y[i]) - target[i]; most = fabsf(errors[i]) > most ? fabsf(errors[i]) : most; }
  float bound = most * 0x1.99999ap-3f;
  EACH(n) {
    float e = errors[i], size = fabsf(e);
    loss += size > bound ? (e * e + bound * bound) / (bound + bound) : size;
    dy[i] = narrow((size > bound ? e / bound : e < 0 ? -1.0f : 1.0f) / (float)n);
  }
  return loss / (float)n;
}

KERNEL void sgd(elem *w, elem *dw, int n, elem rate, elem decay) {
  if (wide(decay) != 0) EACH(n) dw[i] = add(dw[i], mul(decay, w[i]));
  EACH(n) w[i] = sub(w[i], mul(rate, dw[i]));
}
#endif
