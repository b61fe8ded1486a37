// Products of rows and packed weights on a CPU: codes of 1 to 8 bits, a scale for every group of sixteen columns or more.
//
// y[m, n] = sum_k x[m, k] * w[n, k],   w = (table[code] - zero) * scale + offset,   all of float32.
//
// The weights come out as they do in Python, bit for bit; only the order of the sum is another one, and the same for
// every number of rows and threads. Nothing here allocates more than one row's scales a thread.
#include "whole.inc"

namespace nybble {
namespace {

int best() {
#ifdef X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 3;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 2;
#endif
    return 0;
}

// Besides AVX-512, products of bfloat16 and bytes picked anywhere (VBMI).
bool has_bfloat16() {
#ifdef BF16
    unsigned a, b, c, d;
    const bool products = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    return best() == 3 && products && __builtin_cpu_supports("avx512vbmi");
#else
    return false;
#endif
}

// GCC 11 and later know its name only from some minor versions on.
bool has_avxvnni() {
#ifdef X86
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#else
    return false;
#endif
}

// The set of instructions that has a version for these codes, of those up to isa.
int set_of(const Weight& w, int isa) {
#ifdef X86
    if (isa == 3 && avx512_set.pick(w)) return 3;
    if (isa >= 2 && avx2_set.pick(w)) return 2;
#endif
    return 0;
}

Part pick(const Weight& w, int isa) {
#ifdef X86
    const int set = set_of(w, isa);
    if (set == 3) return avx512_set.pick(w);
    if (set == 2) return avx2_set.pick(w);
#endif
    return portable_set.pick(w);
}

// For products of rows of bfloat16, with an x that `arrange_of_bfloat16` made; null: by floats.
Part pick_bfloat16(const Weight& w, int isa) {
#ifdef BF16
    if (isa >= 4 && has_bfloat16()) return pick_of_bfloat16(w);
#endif
    return nullptr;
}

// Whether four bits are multiplied 64 columns at a time, with an x in the order of `nibble_place`.
bool by_nibbles(const Weight& w, int isa) {
    const bool shared = w.row_blocks == 1 || w.group % 64 == 0;
    return isa == 3 && w.bits == 4 && w.k % 64 == 0 && (shared || w.group == 16 || w.group == 32);
}

// Of lane i % 16 after i / 16 shifts, within 64 columns.
inline int nibble_place(int i) { return i % 8 * 8 + i / 8 % 2 * 4 + i / 16; }

Part pick_product(const Weight& w, int isa) {
#ifdef X86
    if (by_nibbles(w, isa)) return avx512_set.pick_nibbles(w);
#endif
    return pick(w, isa);
}

inline float float_of(const void* x, int64_t dtype, int64_t i) {
    if (dtype == FLOAT32) return ((const float*)x)[i];
    const uint16_t half = ((const uint16_t*)x)[i];
    return dtype == BFLOAT16 ? from_bfloat16(half) : whole_float16(half);
}

struct Work { const Weight* w; const Call* call; Part part; int64_t block; int64_t next; int failed; };

void work(void* given) {
    Work& job = *(Work*)given;
    const int64_t floats = 8 * 3 * job.w->room;  // of up to eight rows
    float* room = (float*)malloc(sizeof(float) * (floats ? floats : 1));
    if (!room) {
        __atomic_store_n(&job.failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (;;) {  // whoever is ready takes the next rows: another process may hold one of the cores
        const int64_t from = __atomic_fetch_add(&job.next, job.block, __ATOMIC_RELAXED);
        if (from >= job.call->to) break;
        const int64_t to = from + job.block < job.call->to ? from + job.block : job.call->to;
        job.part(*job.w, *job.call, from, to, room);
    }
    free(room);
}

#include "inputs.inc"
#include "integers.inc"
#include "decoder.inc"
#include "step.inc"

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel

int over_rows(const Weight& w, const Call& call, Part part, int64_t from, int64_t threads, Parallel parallel) {
    int64_t block = 16384 / (w.k ? w.k : 1);
    block = block < 8 ? 8 : block / 8 * 8;
    Work job = {&w, &call, part, block, from, 0};
    if (threads > 1 && parallel && call.to - from > block) parallel(work, &job, (unsigned)threads, 0);
    else work(&job);
    return job.failed;
}

// Where lines of the cache begin, or every load would touch two; null where there is no memory.
void* zeros(size_t bytes) {
    void* made = nullptr;
    if (posix_memalign(&made, 64, bytes)) return nullptr;
    return memset(made, 0, bytes);
}

// call.m rows of x times W, where they are of bfloat16 as such; 0, or 1 where there is no memory.
int multiply(const Weight& w, const void* x, int64_t x_dtype, bool of_bfloat16, Call call, int64_t from, int64_t threads,
             int64_t isa, Parallel parallel) {
    const int use = isa < best() ? (int)isa : best();
    void* own = nullptr;
    Part part = of_bfloat16 ? pick_bfloat16(w, (int)isa) : nullptr;
    if (part) {
#ifdef BF16
        call.stride = (w.k + 127) / 128 * 128;
        own = zeros(sizeof(uint16_t) * (call.m + 3) * call.stride);
        if (!own) return 1;
        arrange_of_bfloat16(w, x, x_dtype, call.m, call.stride, (uint16_t*)own);
        call.x = (const float*)own;
#endif
    } else {
        part = pick_product(w, use);
        const bool turned = by_nibbles(w, use);
        const int64_t tile = call.m == 1 || turned ? call.m : call.m <= 4 ? 4 : (call.m + 7) / 8 * 8;
        if (x_dtype == FLOAT32 && w.k % 16 == 0 && tile == call.m && !turned) call.x = (const float*)x;
        else {
            float* floats = (float*)zeros(sizeof(float) * tile * call.stride);
            if (!floats) return 1;
            int place[64];
            for (int i = 0; i < 64; ++i) place[i] = turned ? nibble_place(i) : i;
            for (int64_t i = 0; i < call.m; ++i) {
                const int64_t first = i / TOGETHER * TOGETHER, side = call.m - first < TOGETHER ? call.m - first : TOGETHER;
                float* own_row = floats + (turned ? first * call.stride + (i - first) * 64 : i * call.stride);
                for (int64_t j = 0; j < w.k; j += 64) {  // turned: of all rows that are multiplied together
                    float* to = own_row + (turned ? j * side : j);
                    const int64_t at = i * w.k + j, count = w.k - j < 64 ? w.k - j : 64;
                    if (x_dtype == FLOAT32)
                        for (int64_t c = 0; c < count; ++c) to[c] = ((const float*)x)[at + place[c]];
                    else
                        for (int64_t c = 0; c < count; ++c) to[c] = float_of(x, x_dtype, at + place[c]);
                }
            }
            call.x = floats, own = floats;
        }
    }
    const int failed = over_rows(w, call, part, from, threads, parallel);
    free(own);
    return failed;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// 0: any processor; 2: AVX2; 3: AVX-512; 4: with products of bfloat16.
int nybble_isa() { return has_bfloat16() ? 4 : best(); }

// The set of instructions that nybble_run multiplies with; 4 is for rows of bfloat16, others take the next.
int nybble_set(const Weight* w, int64_t isa) {
    return pick_bfloat16(*w, (int)isa) ? 4 : set_of(*w, isa < best() ? (int)isa : best());
}

// Fills in what follows from the rest; 0, or 1 where the weight is none that this library multiplies with.
int nybble_prepare(Weight* w) {
    if (w->bits < 1 || w->bits > 8 || w->k * w->bits % 8 || w->group < 1 || w->row_share < 1) return 1;
    if (w->group % 16 && w->group < w->k) return 1;
    w->steps = (w->k + 15) / 16;
    const int64_t short_by = w->steps * 16 * w->bits / 8 - w->k * w->bits / 8;  // bytes that the last step lacks
    w->careful = (short_by + w->bits + 8 + 2 * w->bits - 1) / (2 * w->bits);
    if (w->careful > w->steps) w->careful = w->steps;
    const int64_t bytes = w->k * w->bits / 8;
    w->from = w->n - (short_by + w->bits + 8 + bytes - 1) / bytes;
    const int64_t each = (w->group + 15) / 16;
    w->direct = 1;
    w->shift = 0;
    if (w->row_blocks == 1) w->shift = 62;
    else {
        while ((int64_t)1 << w->shift < each) ++w->shift;
        if ((int64_t)1 << w->shift != each) w->direct = 0, w->shift = 0;
    }
    w->room = w->direct ? w->row_blocks : w->row_blocks * each;
    return 0;
}

// x [m, k] -> out [m, n]; or, without x, the values of rows `from` to `to` in their places of out [n, k].
// 0, or 1 where there is no memory.
int nybble_run(const Weight* w, const void* x, int64_t x_dtype, int64_t m, const float* bias, void* out, int64_t dtype,
               int64_t from, int64_t to, int64_t threads, int64_t isa, Parallel parallel) {
    const Call call = {nullptr, m, 16 * w->steps, bias, out, dtype, w->n, to};
    if (!x) return over_rows(*w, call, pick(*w, isa < best() ? (int)isa : best()), from, threads, parallel);
    return multiply(*w, x, x_dtype, x_dtype == BFLOAT16, call, from, threads, isa, parallel);
}

// Some rows' values, row ids[i] in the i-th place of out [count, k]; 0, or 1 where there is no memory.
int nybble_rows(const Weight* w, const int64_t* ids, int64_t count, void* out, int64_t dtype, int64_t isa) {
    float* room = (float*)malloc(sizeof(float) * (3 * w->room + 1));
    if (!room) return 1;
    const Part part = pick(*w, isa < best() ? (int)isa : best());
    const int64_t bytes = w->k * (dtype == FLOAT32 ? 4 : 2);
    for (int64_t i = 0; i < count; ++i) {
        void* place = (void*)((uintptr_t)out + (uintptr_t)((i - ids[i]) * bytes));
        const Call call = {nullptr, 0, 0, nullptr, place, dtype, w->n, ids[i] + 1};
        part(*w, call, ids[i], ids[i] + 1, room);
    }
    free(room);
    return 0;
}

// x, so many blocks, rounded -> out; 0; 1 where there is no memory; 2 where a scale of all isn't finite, and nothing done.
int nybble_round(const Rounding* how, const void* x, int64_t dtype, int64_t count, void* out, int64_t threads, int64_t isa,
                 Parallel parallel) {
    RoundBlocks run = portable_set.round_blocks;
#ifdef X86
    const int use = isa < best() ? (int)isa : best();
    if (use == 3) run = avx512_set.round_blocks;
    else if (use == 2) run = avx2_set.round_blocks;
#endif
    float outer = 1;
    if (how->nested) {
        const int32_t top = top_of(x, dtype, count * how->columns);
        if (top >= 0x7f800000) return 2;
        memcpy(&outer, &top, 4);
        outer = outer / how->target / how->inner_target;
        if (outer == 0) outer = 1;
    }
    int64_t step = 8192 / how->columns;
    step = step < 1 ? 1 : step;
    RoundingWork job = {how, run, x, dtype, count, step < count ? step : count, 0, outer, out, 0};
    if (threads > 1 && parallel && count >= 4 * step) parallel(round_part, &job, (unsigned)threads, 0);
    else round_part(&job);
    return job.failed;
}

int nybble_whole_isa() { return best_whole(); }

// Whether nybble_whole multiplies with a weight of integer codes.
int nybble_whole_knows(const Weight* w, int64_t isa) {
    return known(w->bits, used_whole(isa)) && w->k <= (int64_t)1 << 30;
}

// x [m, k], rounded as `in` says, times a weight of integer codes -> out [m, n]; 0, or 1 where there is no memory.
int nybble_whole(const Weight* w, int64_t is_signed, const Inputs* in, const void* x, int64_t x_dtype, int64_t m,
                 const float* bias, void* out, int64_t dtype, int64_t threads, int64_t isa, Parallel parallel) {
    const int64_t width = padded(w->k), most = (m + 3) / 4 * 4;
    const bool asymmetric = in->rule == MINMAX || in->zero || in->shift;
    int8_t* ones = (int8_t*)calloc(width, 1);
    if (!ones) return 1;
    const Plan p = plan_of(*w, is_signed, asymmetric, m, ones);
    for (int64_t i = 0; i < w->k; ++i) ones[i / 64 * 64 + p.place[i % 64]] = 1;
    const int use = used_whole(isa);
    const bool tiled = use >= AMX_TILES && p.mode == ONCE && m >= TILED;
    const int64_t turned = tiled ? (m + TILED - 1) / TILED * TILED * width : 0;
    const int64_t sums = most * p.parts * 64, bytes = turned + sums + most * (p.stride + 8);
    uint8_t* room = (uint8_t*)zeros(bytes);
    if (!room) {
        free(ones);
        return 1;
    }
    uint8_t* codes = room + turned + sums;
    Rounded rounded = {(int8_t*)codes, (int32_t*)(room + turned), (float*)(codes + most * p.stride), nullptr, nullptr};
    rounded.zero = (int32_t*)(rounded.scale + most);
    if (tiled) rounded.turned = (int32_t*)room;
    const Call call = {nullptr, m, 0, bias, out, dtype, w->n, w->n};
    const Functions functions = functions_of(use, tiled);
    Product job = {&p, &functions, in, &rounded, &call, x, x_dtype, 8, 0, 0};
    if (threads > 1 && parallel && m > 8) parallel(rounding, &job, (unsigned)threads, 0);
    else rounding(&job);
    const int64_t least = tiled ? 32 : 24;
    int64_t block = 131072 / width / least * least;  // rows of W that stay in the cache while all of x passes
    if (m == 1 || block < least) block = least;
    job.block = block, job.next = 0;
    if (!job.failed && threads > 1 && parallel && w->n > block) parallel(multiplying, &job, (unsigned)threads, 0);
    else if (!job.failed) multiplying(&job);
    free(room);
    free(ones);
    return job.failed;
}

// x [m, width], the embeddings of a token each at one position, through all layers -> x, behind the last norm; 0, 1 where
// there is no memory, 2 where activations that aren't finite can't be rounded.
int nybble_decode(const Decoder* given, float* x, int64_t m, int64_t position, int64_t threads, int64_t isa, int64_t whole_isa,
                  Parallel parallel) {
    const Decoder& d = *given;
    const DecoderMath* math = portable_set.math;
#ifdef X86
    const int use = isa < best() ? (int)isa : best();
    if (use == 3) math = avx512_set.math;
    else if (use == 2) math = avx2_set.math;
#endif
    const int64_t of_q = d.heads * d.head, of_k = d.key_heads * d.head, widest = d.inner > of_q ? d.inner : of_q;
    const int64_t most = widest > d.width ? widest : d.width;
    float* room = (float*)malloc(sizeof(float) * m * (d.width + 2 * of_q + 2 * of_k + 2 * d.inner + 2 * most));
    if (!room) return 1;
    float *h = room, *q = h + m * d.width, *k = q + m * of_q, *v = k + m * of_k, *out = v + m * of_k;
    float *gate = out + m * of_q, *up = gate + m * d.inner, *found = up + m * d.inner, *rounded = found + m * most;
    int failed = 0;
    auto product = [&](const Projection& p, const float* from, float* to) {
        if (failed) return;
        if (p.whole) {
            failed = nybble_whole(p.w, p.is_signed, p.whole, from, FLOAT32, m, p.bias, to, FLOAT32, threads, whole_isa, parallel);
        } else {
            if (p.how) {
                failed = nybble_round(p.how, from, FLOAT32, m * p.w->k / p.how->columns, rounded, threads, isa, parallel);
                if (failed) return;
                math->round_all(d.dtype, rounded, m * p.w->k);
                from = rounded;
            }
            const Call call = {nullptr, m, 16 * p.w->steps, p.bias, to, FLOAT32, p.w->n, p.w->n};
            failed = multiply(*p.w, from, FLOAT32, d.dtype == BFLOAT16, call, 0, threads, isa, parallel);
        }
        math->round_all(d.dtype, to, m * p.w->n);
    };
    for (int64_t i = 0; i < d.count && !failed; ++i) {
        const Layer& layer = d.layers[i];
        for (int64_t j = 0; j < m; ++j) math->normalize(d.dtype, layer.before, d.eps, x + j * d.width, d.width, h + j * d.width);
        product(layer.q, h, q);
        product(layer.k, h, k);
        product(layer.v, h, v);
        if (failed) break;
        Attending job = {&d, &layer, math, q, k, v, out, m, position, 0, 0};
        if (threads > 1 && parallel && m * of_q * (position + 1) > 1 << 16) parallel(attending, &job, (unsigned)threads, 0);
        else attending(&job);
        failed = job.failed;
        product(layer.o, out, found);
        math->add_to(d.dtype, x, found, m * d.width);
        for (int64_t j = 0; j < m; ++j) math->normalize(d.dtype, layer.between, d.eps, x + j * d.width, d.width, h + j * d.width);
        product(layer.gate, h, gate);
        product(layer.up, h, up);
        math->gated(d.dtype, gate, up, m * d.inner);
        product(layer.down, gate, found);
        math->add_to(d.dtype, x, found, m * d.width);
    }
    for (int64_t j = 0; j < m && !failed; ++j) math->normalize(d.dtype, d.last, d.eps, x + j * d.width, d.width, x + j * d.width);
    free(room);
    return failed;
}

const Set& set_of(int64_t isa) {
#ifdef X86
    const int use = isa < best() ? (int)isa : best();
    if (use == 3) return avx512_set;
    if (use == 2) return avx2_set;
#endif
    return portable_set;
}

// The lower 16 bits of the first counts[i] numbers of a Mersenne Twister of seeds[i] -> outs[i].
void nybble_draw(const uint64_t* seeds, const int64_t* counts, uint16_t* const* outs, int64_t tensors, int64_t threads,
                 int64_t isa, Parallel parallel) {
    DrawWork work = {seeds, counts, outs, tensors, 0, &set_of(isa)};
    if (threads > 1 && parallel && tensors > 1) parallel(draw_part, &work, (unsigned)threads, 0);
    else draw_part(&work);
}

// A step of all tensors of a launch, in place; 0, or 1 where there is no memory, and then some may have been stepped.
int nybble_step(const StepJob* job, int64_t threads, int64_t isa, Parallel parallel) {
    const Set& set = set_of(isa);
    const bool rank1 = job->two.kind == RANK1;
    for (int pass = rank1 ? 0 : 1; pass < 2; ++pass) {
        StepWork work = {job, pass ? set.step_chunk : set.maxima_of, 0, 0};
        if (threads > 1 && parallel && job->items > 1) parallel(step_part, &work, (unsigned)threads, 0);
        else step_part(&work);
        if (work.failed) return 1;
    }
    for (int64_t i = 0; rank1 && i < job->count; ++i) {
        const StepTensor& x = job->tensors[i];
        const int64_t height = x.count / x.width;
        for (int64_t j = 0; j < height + x.width; ++j) {
            const float top = job->two.zero && x.fresh[j] == 0 ? 1 : x.fresh[j];
            (j < height ? x.scales[1] + j : x.columns + j - height)[0] = top;
        }
    }
    return 0;
}
}
#pragma GCC visibility pop

}  // namespace nybble
