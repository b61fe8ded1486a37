"""Parts that learn a code book of vectors, and which entry of it each run of weights is."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part, part_name
from nybble.qtensor import QuantParams
from nybble.qtensor.vector import VectorQTensor, VectorQuantizer
from nybble.quantizer import Quantizer


class VectorPart(Part):
    """Goes on from what a solver stored as a code book; no quantizer of numbers, with codes and scales, will do."""

    sides: ClassVar[tuple[str, ...]] = (WEIGHTS,)

    @abstractmethod
    def check_book(self, book: VectorQuantizer) -> None:
        """Raise SchemeError for a code book that can't be learned."""

    @abstractmethod
    def make_vectors(self, quantizer: Quantizer, x: Tensor, start: VectorQTensor) -> Learned:
        """A Learned for a weight with a code book.

        Args:
            quantizer: what the scheme names beside the book.
            x: the weight before, float32 [out, in].
            start: what the solver made of it.
        """

    def check_more(self, quantizer: Quantizer, side: str) -> None:
        self.begin(quantizer, None, None, side)

    def begin(self, quantizer: Quantizer, x: Tensor | None, start: QuantParams | None, side: str) -> Learned:
        """Refuse: there is no book."""
        raise SchemeError(
            f"{part_name(self)} goes on from a code book of vectors, and {quantizer} ({quantizer.format.name}) is "
            "none; use it in a reconstruction behind solver: k-means."
        )
