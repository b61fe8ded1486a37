// For any processor.
#include "common.inc"

#define ISA 0
namespace nybble {
namespace {
#include "packed_body.inc"
#include "inputs_body.inc"
#include "decoder_body.inc"
#include "step_body.inc"
#include "draws_body.inc"
}  // namespace
const Set portable_set = {pick, nullptr, round_blocks, step_chunk, maxima_of, next_words, tempered, &math};

const float* portable_side(const Side& s, int64_t first, int64_t count, int64_t repeat, float* room) {
    return side(s, first, count, repeat, room);
}
int32_t portable_largest_bits(const float* x, int64_t count) { return largest_bits(x, count); }
}  // namespace nybble
