"""The trainable twin of fused experts: a float32 weight an expert, each rounded by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nybble.learned import Learned
from nybble.nn.experts import PackedExperts
from nybble.nn.twin import FakeWeight, Twin


class FakeExperts(Twin):
    """Stands where a fused parameter stood: ``module.gate_up_proj[e]`` rounds expert e's matrix.

    Args:
        matrices: [experts, out, in], any float dtype; copied.
        learned: quantizer of each.
        transposed: the model keeps [in, out], so that is what comes out.
    """

    dtype: torch.dtype

    def __init__(self, matrices: Tensor, learned: Sequence[Learned], *, transposed: bool) -> None:
        super().__init__()
        self.dtype, self.transposed = matrices.dtype, transposed
        pairs = zip(matrices.detach(), learned, strict=True)
        made = (FakeWeight(matrix.float().contiguous().clone(), each, trainable=True) for matrix, each in pairs)
        self.experts = nn.ModuleList(made)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._device

    @property
    def shape(self) -> torch.Size:
        """Of the fused parameter."""
        rows, columns = self.weights()[0].shape
        return torch.Size((len(self.experts), *((columns, rows) if self.transposed else (rows, columns))))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        matrix: Tensor = self.experts[int(expert)](self.dtype)
        return matrix.T if self.transposed else matrix

    def learned(self) -> list[tuple[str, Learned]]:  # noqa: D102
        return [("weights", weight.learned) for weight in self.weights() if weight.learned is not None]

    def float_values(self) -> dict[str, Tensor]:  # noqa: D102
        latent = torch.stack([weight.latent.detach() for weight in self.weights()])
        return {"": latent.mT if self.transposed else latent}  # the fused parameter, whose name is this module's

    def settle_in(self, root: nn.Module, name: str) -> None:  # noqa: D102
        path, _, leaf = name.rpartition(".")
        owner = root.get_submodule(path)
        packed = [weight.packed() for weight in self.weights()]
        settled = PackedExperts(packed, self.dtype, transposed=self.transposed, owner=owner)
        owner.add_module(leaf, settled.train(self.training))
