// What few_rows.cu takes from PTX and CUDA, for a CPU: a thread for each thread of a block, blocks in turn. It is
// included within a namespace: the compiler is told the standard's headers before (test_gpu_products.py).

#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(threads, blocks)

using std::min;

struct uint4 {
    uint32_t x, y, z, w;
};

struct Index {
    unsigned x;
};

struct Warp {
    std::barrier<> together{32};
    uint32_t a[32][4], b[32][2];
    float f[32];
};

thread_local Index threadIdx;
Index blockIdx, gridDim;
constexpr uint32_t BEGIN = 0x400;  // as on the GPU, shared memory doesn't begin where the pairs have to
std::vector<std::unique_ptr<Warp>> warps;
std::unique_ptr<std::barrier<>> block;
alignas(16) uint32_t memory[1 << 16];
uint32_t memory_bytes;

Warp& own() { return *warps[threadIdx.x / 32]; }
void __syncthreads() { block->arrive_and_wait(); }
uint64_t __cvta_generic_to_shared(const void* at) { return static_cast<const char*>(at) - reinterpret_cast<char*>(memory) + BEGIN; }

template <typename T>
T __ldg(const T* at) { return *at; }

float __uint_as_float(uint32_t bits) {
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) { return (uint64_t(high) << 32 | low) >> (by & 31); }

float __shfl_sync(uint32_t, float value, int from) {
    own().f[threadIdx.x % 32] = value;
    own().together.arrive_and_wait();
    const float found = own().f[from];
    own().together.arrive_and_wait();
    return found;
}

float wide(uint32_t bits, bool brain) {
    if (brain) return __uint_as_float(bits << 16);
    _Float16 half;
    const uint16_t low = bits;
    memcpy(&half, &low, 2);
    return half;
}

uint32_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (BRAIN) return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t found;
    memcpy(&found, &half, 2);
    return found;
}

uint32_t pair(float low, float high) { return narrow(low) | narrow(high) << 16; }
float low(uint32_t two) { return wide(two & 0xffff, BRAIN); }
float high(uint32_t two) { return wide(two >> 16, BRAIN); }
uint32_t times(uint32_t a, uint32_t b) { return pair(low(a) * low(b), high(a) * high(b)); }
uint32_t less(uint32_t a, uint32_t b) { return pair(low(a) - low(b), high(a) - high(b)); }

// Where mma.m16n8k16 has its operands: PTX ISA, "Matrix Fragments for mma.m16n8k16".
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Warp& warp = own();
    const int lane = threadIdx.x % 32;
    memcpy(warp.a[lane], a, sizeof a);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    warp.together.arrive_and_wait();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const uint32_t left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            const uint32_t right = warp.b[column * 4 + k % 8 / 2][k / 8];
            c[i] += k % 2 ? high(left) * high(right) : low(left) * low(right);
        }
    }
    warp.together.arrive_and_wait();
}

uint32_t stored(const void* scales, uint32_t index, uint32_t there) {
    if (!there) return 0;
    if (SCALE >= CODES) return static_cast<const uint8_t*>(scales)[index];
    return SCALE == F32 ? static_cast<const uint32_t*>(scales)[index] : static_cast<const uint16_t*>(scales)[index];
}

void aligned(const void* at, size_t to) {
    if (reinterpret_cast<uintptr_t>(at) % to) abort();
}

void load(uint32_t (&w)[BITS], const uint8_t* at, uint32_t there) {
    aligned(at, BITS == 3 ? 4 : 4 * BITS);
    if (there) memcpy(w, at, sizeof w);
}

template <int J>
uint4 columns(const uint16_t* at, uint32_t there) {
    uint4 found{};
    aligned(at, 16);
    if (there) memcpy(&found, at + 8 * J, 16);
    return found;
}

uint32_t from_shared(uint32_t address) {
    if (address - BEGIN + 4 > memory_bytes) abort();
    return memory[(address - BEGIN) / 4];
}

template <typename Kernel>
int start(Kernel kernel, const Args& g, int blocks, int threads, int bytes, void*) {
    gridDim.x = blocks, memory_bytes = bytes;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
        memset(memory, 0xff, sizeof memory);
        warps.clear();
        for (int i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<Warp>());
        block = std::make_unique<std::barrier<>>(threads);
        std::vector<std::thread> all;
        for (int i = 0; i < threads; i++) all.emplace_back([&, i] { threadIdx.x = i, kernel(g); });
        for (auto& one : all) one.join();
    }
    return 0;
}
