// Products of a few rows of x with packed weights on tensor cores, without torch: called by address. Compiled for one kind
// of weight at a time:
//   BITS 2, 3, 4;  BRAIN x in bfloat16, else float16;  SCALE what is stored of a scale (below);  ZERO zero points of 8 bits
//   PRE  scales multiply W, rounded to the dtype of x; else they multiply sums of 128 columns, which share them
//   HALVES  16 columns share a scale (with PRE); else 32 or more
//
// A warp's tile is 16 rows of W by the columns of 4 lanes' pieces of 32 codes. Two neighbouring codes at once are looked up
// in a table of pairs in shared memory, which each lane has in a bank of its own, and come out as a register of the left
// operand of mma.m16n8k16 for those columns; x comes as it lies in memory. The warps of a block share its tiles' columns;
// their sums meet in shared memory, in an order that depends on the shapes alone.

#include <cstdint>

struct NybbleFewRows {
    const uint8_t* codes;
    const float* table;
    const void* scales;
    const float* scale_table;
    const float* outer;
    const int8_t* zeros;
    const uint16_t* x;
    const uint16_t* bias;
    uint16_t* out;
    int32_t n, k, m, across;
    int32_t group_log, share_log, outer_log;  // of 2: columns of a block, rows that share them, blocks under an outer scale
    int32_t tiles, parts;                     // tiles of a block of threads at a time, parts of their columns
    const float* add;
};

namespace {

using Args = NybbleFewRows;

enum { F32, BF16, F16, CODES, CODES_BY_BLOCKS };  // the last: codes times outer scales of their own, plus a number
constexpr int PIECE = 32, WIDE = 4 * PIECE, PAIRS = 1 << 2 * BITS, STEP_BYTES = WIDE * BITS / 8;
constexpr uint32_t TABLE = PAIRS * 128;

#ifdef NYBBLE_HOST  // a header with the same functions for a CPU, by which tests run the rest
#include NYBBLE_HOST
#else

__device__ __forceinline__ float wide(uint32_t bits, bool brain) {
    if (brain) return __uint_as_float(bits << 16);
    float found;
    asm("{.reg .b16 h, l; mov.b32 {h, l}, %1; cvt.f32.f16 %0, h;}" : "=f"(found) : "r"(bits));
    return found;
}

__device__ __forceinline__ uint32_t pair(float low, float high) {
    uint32_t found;
    if (BRAIN) asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(found) : "f"(low), "f"(high));
    else asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(found) : "f"(low), "f"(high));
    return found;
}

__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
    uint32_t found;
    if (BRAIN) asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    else asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    return found;
}

__device__ __forceinline__ uint32_t less(uint32_t a, uint32_t b) {
    uint32_t found;
    if (BRAIN) asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    else asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    return found;
}

#define MMA(type)                                                                                                     \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "         \
        "{%0,%1,%2,%3};"                                                                                              \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (BRAIN) MMA("bf16");
    else MMA("f16");
}

// What is stored of a scale, for once it is used; nothing is read where `there` is false.
__device__ __forceinline__ uint32_t stored(const void* scales, uint32_t index, uint32_t there) {
    uint32_t found = 0;
    if (SCALE >= CODES)
        asm("{.reg .pred p; .reg .u16 h; mov.u16 h, 0; setp.ne.u32 p, %2, 0; @p ld.global.nc.u8 h, [%1]; cvt.u32.u16 %0, h;}"
            : "=r"(found) : "l"(static_cast<const uint8_t*>(scales) + index), "r"(there));
    else if (SCALE == F32)
        asm("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u32 %0, [%1];}"
            : "+r"(found) : "l"(static_cast<const uint32_t*>(scales) + index), "r"(there));
    else
        asm("{.reg .pred p; .reg .b16 h; mov.b16 h, 0; setp.ne.u32 p, %2, 0; @p ld.global.nc.b16 h, [%1]; cvt.u32.u16 %0, h;}"
            : "=r"(found) : "l"(static_cast<const uint16_t*>(scales) + index), "r"(there));
    return found;
}

// A lane's piece of a row: 32 codes in BITS words.
__device__ __forceinline__ void load(uint32_t (&w)[BITS], const uint8_t* at, uint32_t there) {
    if constexpr (BITS == 4)
        asm("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
            : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3]) : "l"(at), "r"(there));
    else if constexpr (BITS == 2)
        asm("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.v2.u32 {%0,%1}, [%2];}"
            : "+r"(w[0]), "+r"(w[1]) : "l"(at), "r"(there));
    else
#pragma unroll
        for (int i = 0; i < BITS; i++)
            asm("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u32 %0, [%1];}"
                : "+r"(w[i]) : "l"(at + 4 * i), "r"(there));
}

// Columns 8 J and on of a row's piece of x, or zeros.
template <int J>
__device__ __forceinline__ uint4 columns(const uint16_t* at, uint32_t there) {
    uint4 found = make_uint4(0, 0, 0, 0);
    asm("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4+%6];}"
        : "+r"(found.x), "+r"(found.y), "+r"(found.z), "+r"(found.w) : "l"(at), "r"(there), "n"(16 * J));
    return found;
}

__device__ __forceinline__ uint32_t from_shared(uint32_t address) {
    uint32_t found;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(found) : "r"(address));  // volatile: behind the barrier
    return found;
}

template <typename Kernel>
int start(Kernel kernel, const Args& g, int blocks, int threads, int bytes, void* stream) {
    const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (failed != cudaSuccess) return failed;
    kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(g);
    return cudaGetLastError();
}

#endif

__device__ __forceinline__ float scale_of(const Args& g, uint32_t bits, uint32_t index, const float* table) {
    if (SCALE == F32) return __uint_as_float(bits);
    if (SCALE < CODES) return wide(bits, SCALE == BF16);
    if (SCALE == CODES) return table[bits];
    const float by = g.outer ? __ldg(g.outer + (index >> g.outer_log)) : 1.f;
    return table[bits] * by + (g.add ? __ldg(g.add) : 0.f);
}

// Pair P of a piece, looked up in the lane's bank: 2 BITS bits from bit 2 BITS P on, times 128, are its place. The table
// begins where these bits of an address are 0.
template <int P>
__device__ __forceinline__ uint32_t look_up(const uint32_t (&w)[BITS], uint32_t bank) {
    constexpr int bit = 2 * BITS * P, word = bit / 32, at = bit % 32;
    uint32_t place;
    if constexpr (at + 2 * BITS > 32) place = __funnelshift_r(w[word], w[(word + 1) % BITS], at) << 7;
    else if constexpr (at >= 7) place = w[word] >> (at - 7);
    else place = w[word] << (7 - at);
    return from_shared((place & (PAIRS - 1) << 7) | bank);
}

// Columns 8 J and on of a piece, of 16 rows of W by NT times 8 rows of x.
template <int NT, int J>
__device__ __forceinline__ void eight(float (&c)[NT][4], const uint32_t (&w)[2][BITS], uint32_t bank, const uint4 (&x)[NT],
                                      const uint32_t (&s)[2][2], const uint32_t (&z)[2][2]) {
    uint32_t a[2][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        a[0][r] = look_up<4 * J>(w[r], bank), a[0][r + 2] = look_up<4 * J + 1>(w[r], bank);
        a[1][r] = look_up<4 * J + 2>(w[r], bank), a[1][r + 2] = look_up<4 * J + 3>(w[r], bank);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (ZERO) a[i / 4][i % 4] = less(a[i / 4][i % 4], z[i % 2][J / 2]);
        if (PRE) a[i / 4][i % 4] = times(a[i / 4][i % 4], s[i % 2][J / 2]);
    }
#pragma unroll
    for (int t = 0; t < NT; t++) {
        mma(c[t], a[0], x[t].x, x[t].y);
        mma(c[t], a[1], x[t].z, x[t].w);
    }
}

// What a warp adds: 16 rows of W from `tile` on, steps `from` to `to` of 128 columns.
template <int NT>
struct Strip {
    const Args& g;
    const float* scale_table;
    uint32_t bank;
    int row_in, quarter, to, down;
    uint32_t rows[2];
    const uint8_t* at;
    const uint16_t* x;
    uint32_t w[2][2][BITS], raw[2][2][2];

    __device__ __forceinline__ void fetch(int slot, int step) {
        const uint32_t column = (step * 4 + quarter) * PIECE;
        const uint32_t there = step < to && column < g.k;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            load(w[slot][r], at + static_cast<uint32_t>(step * STEP_BYTES + (r ? down : 0)), there);
            raw[slot][r][0] = stored(g.scales, rows[r] + (column >> g.group_log), there);
            if (HALVES) raw[slot][r][1] = stored(g.scales, rows[r] + (column >> g.group_log) + 1, there);
        }
    }

    __device__ __forceinline__ void use(float (&c)[NT][4], int slot, int step) {
        const uint32_t column = (step * 4 + quarter) * PIECE;
        const uint32_t there = column < g.k;
        uint32_t s[2][2], z[2][2] = {};
        float real[2], sums[NT][4] = {};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t index = rows[r] + (column >> g.group_log), next = index + HALVES;
            real[r] = scale_of(g, raw[slot][r][0], index, scale_table);
            s[r][0] = s[r][1] = pair(real[r], real[r]);
            if (HALVES) {
                const float second = scale_of(g, raw[slot][r][1], next, scale_table);
                s[r][1] = pair(second, second);
            }
            if (ZERO && there) {
                const float zero = g.zeros[index], after = g.zeros[next];
                z[r][0] = pair(zero, zero), z[r][1] = pair(after, after);
            }
        }
        auto& to_add = PRE ? c : sums;
        uint4 b[NT];
        const uint16_t* here = x + step * WIDE;
        piece<0>(b, here, there), eight<NT, 0>(to_add, w[slot], bank, b, s, z);
        piece<1>(b, here, there), eight<NT, 1>(to_add, w[slot], bank, b, s, z);
        piece<2>(b, here, there), eight<NT, 2>(to_add, w[slot], bank, b, s, z);
        piece<3>(b, here, there), eight<NT, 3>(to_add, w[slot], bank, b, s, z);
        if (!PRE) {
#pragma unroll
            for (int r = 0; r < 2; r++) real[r] = __shfl_sync(0xffffffffu, real[r], row_in * 4);  // others may be beyond k
#pragma unroll
            for (int i = 0; i < NT * 4; i++) c[i / 4][i % 4] += sums[i / 4][i % 4] * real[i % 4 / 2];
        }
    }

    template <int J>
    __device__ __forceinline__ void piece(uint4 (&b)[NT], const uint16_t* here, uint32_t there) {
#pragma unroll
        for (int t = 0; t < NT; t++) b[t] = columns<J>(here + 8 * t * g.k, there && 8 * t + row_in < g.m);
    }
};

template <int NT, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) few_rows(const __grid_constant__ Args g) {
    extern __shared__ uint32_t memory[];  // as far as the pairs may begin; pairs; 256 scales; sums [warps][NT][4][32]
    const uint32_t base_address = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    const uint32_t lead = -base_address % TABLE;
    uint32_t* const shared = memory + lead / 4;
    float* const scale_table = reinterpret_cast<float*>(shared + PAIRS * 32);
    float* const sums = scale_table + 256;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_in = lane / 4, quarter = lane % 4;
    const int tiles = (g.n + 15) / 16, row_bytes = g.k / 8 * BITS, steps = (g.k + WIDE - 1) / WIDE;
    const int first = static_cast<int64_t>(blockIdx.x) * tiles / gridDim.x;
    const int last = static_cast<int64_t>(blockIdx.x + 1) * tiles / gridDim.x;
    const uint32_t bank = base_address + lead + 4 * lane;
    const int mine = warp / g.parts, part = warp % g.parts;

    for (int base = first; base < last; base += g.tiles) {
        const int tile = base + mine;
        const bool busy = mine < g.tiles && tile < last;
        const int from = busy ? steps * part / g.parts : 0, to = busy ? steps * (part + 1) / g.parts : 0;
        const int top = min(tile * 16 + row_in, g.n - 1), low = min(tile * 16 + row_in + 8, g.n - 1);
        float c[NT][4] = {};
        Strip<NT> strip{g, scale_table, bank, row_in, quarter, to, (low - top) * row_bytes};
        strip.rows[0] = (top >> g.share_log) * g.across;
        strip.rows[1] = (low >> g.share_log) * g.across;
        strip.at = g.codes + static_cast<int64_t>(top) * row_bytes + quarter * (PIECE * BITS / 8);
        strip.x = g.x + static_cast<int64_t>(row_in) * g.k + quarter * PIECE;
        strip.fetch(0, from);
        strip.fetch(1, from + 1);
        if (base == first) {  // while the first codes are on their way
            for (int i = warp; i < PAIRS; i += WARPS)
                shared[i * 32 + lane] = pair(__ldg(g.table + i % (1 << BITS)), __ldg(g.table + i / (1 << BITS)));
            if (SCALE >= CODES)
                for (int i = threadIdx.x; i < 256; i += WARPS * 32) scale_table[i] = __ldg(g.scale_table + i);
        }
        __syncthreads();
        for (int step = from; step < to; step += 2) {
            strip.use(c, 0, step);
            strip.fetch(0, step + 2);
            if (step + 1 < to) {
                strip.use(c, 1, step + 1);
                strip.fetch(1, step + 3);
            }
        }
#pragma unroll
        for (int i = 0; i < NT * 4; i++) sums[(warp * NT * 4 + i) * 32 + lane] = c[i / 4][i % 4];
        __syncthreads();
        for (int i = threadIdx.x; i < g.tiles * 16 * g.m; i += WARPS * 32) {
            const int which = i / 16 % g.tiles, r = i % 16, line = i / 16 / g.tiles, row = (base + which) * 16 + r;
            if (base + which >= last || row >= g.n) continue;
            const int owner = r % 8 * 4 + line % 8 / 2, slot = line / 8 * 4 + r / 8 * 2 + line % 2;
            float y = 0;
            for (int p = 0; p < g.parts; p++) y += sums[((which * g.parts + p) * NT * 4 + slot) * 32 + owner];
            if (SCALE == CODES && g.outer) y *= __ldg(g.outer);
            if (g.bias) y += wide(g.bias[row], BRAIN);
            g.out[static_cast<int64_t>(line) * g.n + row] = static_cast<uint16_t>(pair(y, y));
        }
    }
}

template <int NT, int WARPS, int BLOCKS>
int launch(const Args& g, int blocks, void* stream) {
    return start(few_rows<NT, WARPS, BLOCKS>, g, blocks, WARPS * 32, 2 * TABLE + 1024 + WARPS * NT * 512, stream);
}

}  // namespace

// 0, or a CUDA error. Up to 8 `of` rows of x, which is 1, 2, 4 or 8.
extern "C" __attribute__((visibility("default"))) int nybble_few_rows(const NybbleFewRows* g, int of, int blocks, void* stream) {
    if (of == 1) return launch<1, WARPS_1, BLOCKS_1>(*g, blocks, stream);
    if (of == 2) return launch<2, WARPS_2, BLOCKS_2>(*g, blocks, stream);
    if (of == 4) return launch<4, WARPS_4, BLOCKS_4>(*g, blocks, stream);
    return launch<8, WARPS_8, BLOCKS_8>(*g, blocks, stream);
}
