"""A linear layer's weights as a mixture of experts that depends on the architecture, not on the input.

    r = softmax(MLP(e_a))             W_a = sum_i r_i trim(E_i, a)              one distribution a layer
    R[j] = softmax over i             W_a[j] = sum_i R[j, i] trim(E_i, a)[j]    one for each output neuron

Mixture-of-Supernets (Jawahar et al. 2023, arXiv:2306.04845): biases are mixed alike, all experts take part, and for one
architecture W_a is a constant, so what is deployed has neither experts nor routers. The router gives neuron-major
numbers (all experts of neuron 0 first), so a narrower layer reads the first rows of R.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, UsageError
from nybble.core.shapes import Float

Router = Literal["layer", "neuron"]


class Mixture(nn.Module):
    """Experts 2 to m of a linear layer, and the router; expert 1 is the layer's own weight.

    All experts begin as copies of the layer. Then the router has no gradient in the first step, and experts come apart
    since its random numbers weigh their gradients differently.

    Args:
        linear: the layer at its largest size.
        encoding: numbers of an architecture. experts: at least 2. router: ``layer`` or ``neuron``.
        hidden: units of the router. dropout: behind them.
    """

    def __init__(
        self, linear: nn.Linear, encoding: int, experts: int, router: Router, hidden: int = 128, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if experts < 2:
            raise UsageError(
                f"a mixture has 2 experts or more; got {experts}. One expert is plain sharing: no mixture."
            )
        self.experts, self.encoding, self.by_neuron = experts, encoding, router == "neuron"
        self.weights = nn.Parameter(linear.weight.detach().clone().repeat(experts - 1, 1, 1))
        bias = linear._parameters["bias"]
        self.biases = None if bias is None else nn.Parameter(bias.detach().clone().repeat(experts - 1, 1))
        outputs = experts * (linear.out_features if self.by_neuron else 1)
        self.router = nn.Sequential(
            nn.Linear(encoding, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)
        ).to(linear.weight.device)

    def shares(self, encoding: Tensor, rows: int) -> Float[Tensor, "rows experts"]:
        """Of each expert in the first ``rows`` output neurons; they sum to 1.

        Args:
            encoding: float32 [numbers], of an architecture; on the CPU, where looking at it waits for nothing.
            rows: of the layer in it.

        Raises:
            ModelError: an encoding of another length, or one that is no number.
        """
        if encoding.shape != (self.encoding,):
            raise ModelError(
                f"the router reads {self.encoding} numbers of an architecture; got {list(encoding.shape)}."
            )
        if not bool(torch.isfinite(encoding).all()):
            raise ModelError(f"the encoding of the architecture is NaN or Inf: {encoding.tolist()}.")
        given: Tensor = self.router(encoding.to(self.weights.device))
        if self.by_neuron:
            return given.view(-1, self.experts)[:rows].softmax(1)
        return given.softmax(0).expand(rows, -1)

    def forward(
        self, weight: Tensor, bias: Tensor | None, encoding: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's weight and bias in an architecture.

        Args:
            weight: float [out, in], expert 1.
            bias: [out], or None.
            encoding: float32 [numbers], of the architecture.
            size: rows and columns there.
        """
        rows, columns = size
        with torch.autocast(weight.device.type, enabled=False):  # what is mixed is deployed, so it isn't rounded
            shares = self.shares(encoding, rows)
            mixed = shares[:, :1] * weight[:rows, :columns]
            for number, expert in enumerate(self.weights, 1):
                mixed = mixed + shares[:, number, None] * expert[:rows, :columns]
            if bias is None or self.biases is None:
                return mixed, None
            every = torch.cat((bias[None, :rows], self.biases[:, :rows]))
            return mixed, (shares * every.T).sum(1)
