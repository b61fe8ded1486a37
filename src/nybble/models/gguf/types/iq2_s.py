"""IQ2_S: vectors of eight from a book of 1024, and their signs; four-bit scales."""

from nybble.models.gguf.types._codebook import Book, at_first, book_type, nibbles, signed, steps

PART = book_type(
    22,
    16,
    Book(
        "IQ2_S",
        82,
        signed(8, 25, 43),
        steps(0.125, 0.25, 16),
        nibbles(74),
        at_first,
    ),
)
