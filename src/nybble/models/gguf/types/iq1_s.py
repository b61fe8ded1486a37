"""IQ1_S: ternary vectors of eight from a book of 2048, shifted by an eighth; three-bit scales."""

from nybble.models.gguf.types._codebook import TERNARY, Book, at_first, book_type, steps, top_bits

PART = book_type(
    19,
    32,
    Book(
        "IQ1_S",
        50,
        tuple(TERNARY),
        steps(1, 2, 8),
        top_bits(34, 1, "<u2", 12, 7),
        at_first,
    ),
)
