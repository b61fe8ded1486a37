// Products of whole numbers for any processor.
#include "whole.inc"

#define ISA 0
#define VNNI 0
namespace nybble {
namespace {
#include "integers_body.inc"
}  // namespace
const Functions whole_portable = functions;
}  // namespace nybble
