"""IQ3_XXS: vectors of four from a book of 256, signs of an even number of minuses; four-bit scales."""

from nybble.models.gguf.types._codebook import Book, at_first, book_type, signed, steps, top_bits

PART = book_type(
    18,
    32,
    Book(
        "IQ3_XXS",
        98,
        signed(4, 12, 20, 28, 36, 44, 52, 62),
        steps(0.25, 0.5, 16),
        top_bits(66, 1, "<u4", 28, 15),
        at_first,
    ),
)
