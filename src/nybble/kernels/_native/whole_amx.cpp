// Products of whole numbers for processors with AMX, of sixteen rows of x and more, where W has a scale a row.
#include "whole.inc"

#if defined(AMX) && defined(X86)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-int8")
#endif
namespace nybble {
namespace {
#include "tiles.inc"

struct Tiles {  // the processor's; GCC's own intrinsics take no number of a tile that a template has
    explicit Tiles(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
    ~Tiles() { __asm__ volatile("tilerelease"); }
    template <int T> static inline INLINE void zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }
    template <int T> static inline INLINE void load(const void* p, int64_t stride) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int T> static inline INLINE void store(void* p, int64_t stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int C, int A, int B> static inline INLINE void dot() {  // bytes of A unsigned, of B signed
        __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};

bool asked() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    constexpr int REQUEST = 0x1023, DATA = 18;  // arch_prctl(2): a process asks before it uses tiles
    return (a >> 17 & 3) == 3 && syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
}
}  // namespace

bool has_amx() {
    static int known;  // 1: no; 2: yes
    int found = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!found) __atomic_store_n(&known, found = asked() ? 2 : 1, __ATOMIC_RELAXED);
    return found == 2;
}
void multiply_by_amx(const Plan& p, const Rounded& x, const Call& call, int64_t n, int64_t to, const Codes* w) {
    by_tiles<Tiles>(p, x, call, n, to, w);
}
}  // namespace nybble
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
