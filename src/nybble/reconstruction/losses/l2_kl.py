"""CBQ's error: the squared distance of hidden states, and the divergence of their softmax.

    E(h1, h2) = |h1 - h2|^2 + KL(softmax(h1) || softmax(h2)),     h1 the float output

Ding et al. 2023, "CBQ: Cross-Block Quantization for Large Language Models", arXiv:2312.07950. Sums over features, the
mean over real tokens (over the places of images), in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nybble.reconstruction import FLOAT, Reconstruction
from nybble.reconstruction.losses._errors import distance_and_divergence, real_vectors


@dataclass(frozen=True, kw_only=True)
class L2KL(Reconstruction):
    """The engine's options are its own."""

    def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:  # noqa: D102
        return distance_and_divergence(*real_vectors(output, wanted[FLOAT], mask))


PART = L2KL
