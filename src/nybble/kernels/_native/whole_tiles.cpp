// Tiles of bytes as AMX has them, in C: what its products are tested by where no processor has it.
#include "whole.inc"

namespace nybble {
namespace {
#include "tiles.inc"

struct Tiles {
    const TileShapes& shapes;
    uint8_t bytes[8][16][64];
    explicit Tiles(const TileShapes& given) : shapes(given) {}
    template <int T> void zero() { memset(bytes[T], 0, sizeof(bytes[T])); }
    template <int T> void load(const void* p, int64_t stride) {
        zero<T>();
        for (int i = 0; i < shapes.rows[T]; ++i) memcpy(bytes[T][i], (const uint8_t*)p + i * stride, shapes.columns[T]);
    }
    template <int T> void store(void* p, int64_t stride) {
        for (int i = 0; i < shapes.rows[T]; ++i) memcpy((uint8_t*)p + i * stride, bytes[T][i], shapes.columns[T]);
    }
    template <int C, int A, int B> void dot() {
        for (int i = 0; i < shapes.rows[C]; ++i)
            for (int k = 0; k < shapes.columns[A]; ++k)
                for (int j = 0; j < shapes.columns[C] / 4; ++j) {
                    int32_t sum;
                    memcpy(&sum, bytes[C][i] + 4 * j, 4);
                    sum += (int32_t)bytes[A][i][k] * (int8_t)bytes[B][k / 4][4 * j + k % 4];
                    memcpy(bytes[C][i] + 4 * j, &sum, 4);
                }
    }
};
}  // namespace

void multiply_by_tiles(const Plan& p, const Rounded& x, const Call& call, int64_t n, int64_t to, const Codes* w) {
    by_tiles<Tiles>(p, x, call, n, to, w);
}
}  // namespace nybble
