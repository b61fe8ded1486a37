"""IQ2_XS: vectors of eight from a book of 512, signs of an even number of minuses; four-bit scales."""

from nybble.models.gguf.types._codebook import Book, at_first, book_type, nibbles, signed, steps

PART = book_type(
    17,
    16,
    Book(
        "IQ2_XS",
        74,
        signed(8, 25, 43),
        steps(0.125, 0.25, 16),
        nibbles(66),
        at_first,
    ),
)
