"""Bias correction of convolutions: the mean error of every output channel goes into its bias.

Nagel et al. 2019, arXiv:1906.04721, section 4.2, from data: channels of a depthwise convolution often have inputs with
a large mean (behind a BatchNorm and ReLU) and kernels that nearly cancel it, so a rounding error of theirs is a shift
of the whole channel. We correct both roundings, of weights and of inputs, on the float network's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer
from nybble.solvers import by_group


def mean_error(
    matrix: Tensor, rounded: Tensor, inputs: Tensor, quantizer: Quantizer | None, params: QuantParams | None
) -> Tensor:
    """By how much outputs are too small on average.

    Args:
        matrix: weights, float32 [rows, columns].
        rounded: the same, rounded.
        inputs: a sample, float [tokens, columns] or [groups, tokens, columns].
        quantizer: of the inputs; None leaves them as they are.
        params: of a static quantizer.

    Returns:
        float32 [rows], to be added to the bias.
    """
    x = inputs.float()
    given = x if quantizer is None else quantizer.fake_quantize(x, params)
    lost = x.mean(-2, keepdim=True) @ by_group(matrix, x).mT - given.mean(-2, keepdim=True) @ by_group(rounded, x).mT
    return torch.flatten(lost)
