"""Spaces of cells, as DARTS has them (arXiv:1806.09055), and what is made of two cells and a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import UsageError
from nybble.models.operations import make_operation
from nybble.models.own.cells import CellsConfig, CellsForImageClassification, chosen, edges
from nybble.search.architectures import Found, Study
from nybble.search.choices.blocks import Choices
from nybble.search.choices.macs import macs
from nybble.search.choices.method import ImageSearch, seeded
from nybble.training.norms import running_norms
from nybble.training.tasks import Row

Node = list[tuple[int, str]]
"""Inputs of a node and their operations."""


@dataclass(frozen=True, kw_only=True)
class CellSpace:
    """As :class:`~nybble.models.own.cells.CellsConfig` has them; ``most`` channels of what is found."""

    channels: int = 16
    most: int = 36
    cells: int = 8
    found_cells: int = 20
    nodes: int = 4
    operations: tuple[str, ...] = (
        "none", "max-pool", "avg-pool", "skip", "sep-3", "sep-5", "dil-3", "dil-5",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not [name for name in self.operations if name != "none"]:
            raise UsageError("space: operations are names of one or more beside none.")
        if min(self.nodes, self.cells, self.found_cells) < 1 or self.channels % 2 or self.channels < 2 or self.most < 2:
            raise UsageError("space: nodes and cells are 1 or more, channels an even number of 2 or more.")

    def supernet(self, about: Mapping[str, Any]) -> CellsForImageClassification:
        """All operations on every edge, a BatchNorm behind pools too, and none with weights."""

        def make(halves: bool, edge: tuple[int, int], channels: int, stride: int) -> nn.Module:
            parts = {name: make_operation(name, channels, channels, stride) for name in self.operations}
            for name in ("max-pool", "avg-pool"):
                if name in parts:
                    parts[name] = nn.Sequential(parts[name], nn.BatchNorm2d(channels))
            made = Choices(parts)
            norms: list[Any] = running_norms(made)
            for norm in norms:
                norm.affine, norm.weight, norm.bias = False, None, None
            return made

        config = CellsConfig(channels=self.channels, cells=self.cells, nodes=self.nodes, **about)
        return CellsForImageClassification(config, make)

    def network(self, about: Mapping[str, Any], cells: Sequence[list[Node]], channels: int) -> Any:
        """Of a normal and a halving cell, as a folder can hold it."""
        normal, halving = (chosen(cell) for cell in cells)
        config = CellsConfig(
            channels=channels, cells=self.found_cells, nodes=self.nodes, normal=normal, halving=halving, **about
        )
        return CellsForImageClassification(config)

    def cost(self, about: Mapping[str, Any], cells: Sequence[list[Node]], channels: int) -> int:
        """Multiply-accumulates of an image."""
        with torch.device("meta"):
            image = torch.zeros(1, about["num_channels"], *about["image_size"])
            return macs(self.network(about, cells, channels), image)

    def ends(self, about: Mapping[str, Any]) -> tuple[int, int]:
        """The least that a network of the space has, and what the largest has at ``most`` channels."""
        names = [name for name in self.operations if name != "none"]
        alike = [
            [[[(source, name) for source in (0, 1)] for _ in range(self.nodes)]] * 2 for name in names
        ]  # one operation everywhere
        small = [self.cost(about, cells, 2) for cells in alike]
        return min(small), self.cost(about, alike[small.index(max(small))], self.most)

    def fitting(self, about: Mapping[str, Any], cells: Sequence[list[Node]], limit: int) -> tuple[int, int]:
        """The largest even number of channels that a budget allows, and what the network has then.

        Raises:
            UsageError: not even 2.
        """
        low, high = 1, self.most // 2  # pairs of channels; a network of more costs more
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost(about, cells, 2 * middle) <= limit else (low, middle - 1)
        found = self.cost(about, cells, 2 * low)
        if found > limit:
            raise UsageError(f"the found cells have {found:,} multiply-accumulates with 2 channels, above {limit:,}.")
        return 2 * low, found


def kept(chances: Tensor, operations: Sequence[str], nodes: int) -> list[Node]:
    """A cell of softmaxed alphas [edges, operations]: of each node two inputs, each with its likeliest operation."""
    weights = chances.clone()
    if "none" in operations:
        weights[:, operations.index("none")] = -1
    found: list[Node] = [[] for _ in range(nodes)]
    of = {edge: number for number, edge in enumerate(edges(nodes))}
    for node in range(nodes):
        ranked = sorted(range(2 + node), key=lambda source: -float(weights[of[node, source]].max()))
        for source in sorted(ranked[:2]):
            found[node].append((source, operations[int(weights[of[node, source]].argmax())]))
    return found


def found_cells(
    method: ImageSearch, space: CellSpace, study: Study, rows: Sequence[Row], cells: Sequence[list[Node]],
    compared: Sequence[Mapping[str, Any]] = (),
) -> Found:  # fmt: skip
    """Cells as a trained network, with the channels that the budget allows."""
    about = method.config_of(study)
    _, full = space.ends(about)
    channels, cost = space.fitting(about, cells, study.budget.limit(full))
    seeded(study, "found")
    model = space.network(about, cells, channels).to(study.device)
    measures = method.finished(study, model, rows)
    skips = sum(name == "skip" for cell in cells for node in cell for _, name in node)
    parts = [
        {"cell": word, "node": number, "inputs": " ".join(f"{at}:{name}" for at, name in node)}
        for word, cell in zip(("normal", "halving"), cells, strict=True)
        for number, node in enumerate(cell)
    ]
    return Found(
        model=model, encoding={"normal": chosen(cells[0]), "halving": chosen(cells[1]), "channels": channels},
        cost=cost, full=full, measures={**measures, "skip connections": skips}, parts=parts, compared=compared,
    )  # fmt: skip
