"""IQ2_XXS: vectors of eight from a book of 256, signs of an even number of minuses; four-bit scales."""

from nybble.models.gguf.types._codebook import Book, at_first, book_type, signed, steps, top_bits

PART = book_type(
    16,
    32,
    Book(
        "IQ2_XXS",
        66,
        signed(8, 25, 43),
        steps(0.125, 0.25, 16),
        top_bits(2, 2, "<u4", 28, 15),
        at_first,
    ),
)
