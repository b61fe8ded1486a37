"""IQ3_S: vectors of four from a book of 512, and their signs; four-bit scales."""

from nybble.models.gguf.types._codebook import Book, at_first, book_type, nibbles, signed, steps

PART = book_type(
    21,
    32,
    Book(
        "IQ3_S",
        110,
        signed(*steps(1, 2, 8)),
        steps(1, 2, 16),
        nibbles(106),
        at_first,
    ),
)
