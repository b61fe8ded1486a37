// Products of whole numbers on an emulated processor without a system: each set of instructions against the portable one,
// bit for bit; and, before that, AMX's instruction against its definition. Built and run by ../emulated_amx.py.
#include "whole.inc"

using namespace nybble;
extern "C" {
int nybble_isa(); int nybble_whole_isa(); int nybble_prepare(Weight*); int nybble_whole_knows(const Weight*, int64_t); int nybble_set(const Weight*, int64_t);
int nybble_whole(const Weight*, int64_t, const Inputs*, const void*, int64_t, int64_t, const float*, void*, int64_t, int64_t, int64_t, void (*)(void (*)(void*), void*, unsigned, unsigned));
int nybble_run(const Weight*, const void*, int64_t, int64_t, const float*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, void (*)(void (*)(void*), void*, unsigned, unsigned));
static char heap[96 << 20]; static size_t used;
void* malloc(size_t n) { used = (used + 63) & ~63ul; void* p = heap + used; used += n; if (used > sizeof heap) for(;;); return p; }
void free(void*) {}
void* memset(void* d, int c, size_t n) { char* p = (char*)d; while (n--) *p++ = (char)c; return d; }
void* memcpy(void* d, const void* s, size_t n) { char* p = (char*)d; const char* q = (const char*)s; while (n--) *p++ = *q++; return d; }
void* calloc(size_t a, size_t b) { return memset(malloc(a * b), 0, a * b); }
int posix_memalign(void** p, size_t, size_t n) { *p = malloc(n); return 0; }
float expf(float x) { return x; } float sqrtf(float x) { return x; } float fmaf(float a, float b, float c) { return __builtin_ia32_vfmaddss3((__v4sf){a}, (__v4sf){b}, (__v4sf){c})[0]; }
long syscall(long, ...) { return 0; }
}
static inline void out(char c) { uint8_t s; do __asm__ volatile("inb %1, %0" : "=a"(s) : "Nd"((uint16_t)0x3fd)); while (!(s & 32)); __asm__ volatile("outb %0, %1" ::"a"(c), "Nd"((uint16_t)0x3f8)); }
static void say(const char* s) { while (*s) out(*s++); }
static void number(int64_t n) { char b[24]; int i = 0; if (n < 0) out('-'), n = -n; do b[i++] = '0' + n % 10; while (n /= 10); while (i) out(b[--i]); out(' '); }
static uint32_t seed = 1;
static uint32_t draw() { return seed = seed * 1664525u + 1013904223u; }
static float uniform() { return (float)(int32_t)draw() * 0x1p-31f; }
// Wrong ones of 256 sums: bytes of the first operand are unsigned, of the second signed.
static int instruction() {
    static struct { uint8_t palette, start, none[14]; uint16_t columns[16]; uint8_t rows[16]; } shapes;
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) shapes.columns[i] = 64, shapes.rows[i] = 16;
    static uint8_t a[1024];
    static int8_t b[1024];
    static int32_t c[256];
    for (int i = 0; i < 1024; ++i) a[i] = draw() >> 24, b[i] = (int8_t)(draw() >> 24);
    __asm__ volatile("ldtilecfg %0\n tilezero %%tmm0\n tileloadd (%1,%4,1), %%tmm4\n tileloadd (%2,%4,1), %%tmm6\n"
                     "tdpbusd %%tmm6, %%tmm4, %%tmm0\n tilestored %%tmm0, (%3,%4,1)" ::"m"(shapes), "r"(a), "r"(b), "r"(c), "r"(64l) : "memory");
    int wrong = 0;
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            int32_t sum = 0;
            for (int k = 0; k < 64; ++k) sum += (int32_t)a[m * 64 + k] * b[k / 4 * 64 + n * 4 + k % 4];
            wrong += sum != c[m * 16 + n];
        }
    return wrong;
}

extern "C" void run() {
    __asm__ volatile("xsetbv" ::"a"(0x600e7), "d"(0), "c"(0));
    __asm__ volatile("outb %0, %1" ::"a"((uint8_t)3), "Nd"((uint16_t)0x3fb)); __builtin_cpu_init();
    say("isa "); number(nybble_isa()); say("whole "); number(nybble_whole_isa()); out('\n');
    say("instruction "), number(instruction()), out('\n');
    const int64_t ms[] = {1, 16, 17, 31, 33, 70}, ns[] = {16, 33, 70}, ks[] = {64, 200, 448};
    const int64_t isas[] = {4, 5};
    int64_t cases = 0, bad = 0, lost = 0;
    for (int bits : {8, 4, 2}) for (int sign = 0; sign < 2; ++sign) for (int zeros = 0; zeros < 2; ++zeros) for (int rule = 1; rule < 3; ++rule)
        for (int64_t n : ns) for (int64_t k : ks) {
            used = 0;
            Weight w; memset(&w, 0, sizeof w);
            uint8_t* codes = (uint8_t*)malloc(n * k * bits / 8 + 64); for (int64_t i = 0; i < n * k * bits / 8; ++i) codes[i] = draw() >> 24;
            float* table = (float*)malloc(4 * (1 << bits)); for (int i = 0; i < 1 << bits; ++i) table[i] = sign && i >> (bits - 1) ? i - (1 << bits) : i;
            float* scale = (float*)malloc(4 * n); float* zero = (float*)malloc(4 * n);
            for (int64_t i = 0; i < n; ++i) scale[i] = 0.01f + 0.001f * uniform(), zero[i] = (float)((int)(draw() >> 24) % (1 << bits) - (sign ? 1 << (bits - 1) : 0));
            w.codes = codes, w.table = table, w.n = n, w.k = k, w.bits = bits, w.kind = bits == 8 ? LINEAR : TABLE, w.flip = bits == 8 && sign ? 128 : 0, w.base = bits == 8 && sign ? -128 : 0;
            w.group = k, w.row_blocks = 1, w.row_share = 1, w.affine = zeros, w.exact = 1;
            w.scale.data = scale, w.scale.size = n; w.scale.absent = 1; w.zero.absent = w.offset.absent = 0;
            if (zeros) w.zero.data = zero, w.zero.size = n;
            if (nybble_prepare(&w)) { say("no weight\n"); return; }
            Inputs in; memset(&in, 0, sizeof in); in.rule = rule, in.target = 127, in.low = -128, in.high = 127;
            float* bias = (float*)malloc(4 * n); for (int64_t i = 0; i < n; ++i) bias[i] = uniform();
            float* x = (float*)malloc(4 * 70 * k); for (int64_t i = 0; i < 70 * k; ++i) x[i] = uniform() * 3;
            uint32_t* want = (uint32_t*)malloc(4 * 70 * n), *got = (uint32_t*)malloc(4 * 70 * n);
            const size_t mark = used;
            for (int64_t m : ms) {
                used = mark;
                if (nybble_whole(&w, sign, &in, x, 0, m, bias, want, 0, 1, 0, nullptr)) ++lost;
                for (int64_t isa : isas) {
                    memset(got, 255, 4 * m * n); 
                    if (nybble_whole(&w, sign, &in, x, 0, m, bias, got, 0, 1, isa, nullptr)) ++lost;
                    ++cases; int wrong = 0;
                    for (int64_t i = 0; i < m * n; ++i) wrong += want[i] != got[i];
                    if (wrong) { if (++bad < 20) { say("bad: bits sign zeros rule n k m isa, how many: "); for (int64_t v : {(int64_t)bits, (int64_t)sign, (int64_t)zeros, (int64_t)rule, n, k, m, isa, (int64_t)wrong}) number(v); out('\n'); } }
                }
            }
        }
    say("cases "); number(cases); say("bad "); number(bad); say("failed "); number(lost); say("\ndone\n");
}
