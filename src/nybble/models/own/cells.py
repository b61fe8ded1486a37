"""A network of two kinds of cells, as DARTS has it (Liu et al. 2019, arXiv:1806.09055): normal ones and halving ones.

A cell gets the outputs of the two cells before it. Node i adds up operations on some of those and of the nodes before;
the cell gives all its nodes. At a third and at two thirds of the depth stand the cells that halve the image and double
the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from nybble.models.operations import Halved, convolved, make_operation

Edge = tuple[int, int]
"""A node, and which of its inputs: 0 and 1 are the cells before, then nodes."""
Make = Callable[[bool, Edge, int, int], nn.Module | None]
"""What stands on an edge: of a halving cell or not, which, channels, stride; None: nothing does."""


class CellsConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes and cells.

    Attributes:
        num_channels, image_size: of an image, height and width.
        channels: of a node in the first cells; a cell has ``nodes`` times as many. cells: how many. stem: times
            ``channels``, of the first convolution.
        normal, halving: of each node its operations, as pairs of an input's number and a name.
    """

    model_type = "nybble-cells"

    def __init__(self, **options: Any) -> None:
        self.num_channels: int = options.pop("num_channels", 3)
        self.image_size: list[int] = list(options.pop("image_size", (32, 32)))
        self.channels: int = options.pop("channels", 16)
        self.cells: int = options.pop("cells", 8)
        self.nodes: int = options.pop("nodes", 4)
        self.stem: int = options.pop("stem", 3)
        self.normal: list[list[list[Any]]] = options.pop("normal", [])
        self.halving: list[list[list[Any]]] = options.pop("halving", [])
        super().__init__(**options)

    def make(self, halves: bool, edge: Edge, channels: int, stride: int) -> nn.Module | None:
        """What the config says of an edge."""
        node, source = edge
        for at, name in (self.halving if halves else self.normal)[node]:
            if at == source:
                return make_operation(name, channels, channels, stride)
        return None


def edges(nodes: int) -> list[Edge]:
    """All that a cell could have."""
    return [(node, source) for node in range(nodes) for source in range(2 + node)]


class Cell(nn.Module):
    """One cell, which gives [n, nodes * channels, h, w]."""

    def __init__(
        self, nodes: int, into: tuple[int, int], channels: int, halves: bool, halved_before: bool, make: Make
    ) -> None:
        super().__init__()
        before: list[nn.Module] = [nn.ReLU(), *convolved(into[0], channels, 1, act=False)]
        self.first = Halved(into[0], channels) if halved_before else nn.Sequential(*before)
        self.second = nn.Sequential(nn.ReLU(), *convolved(into[1], channels, 1, act=False))
        self.edges, self.nodes, self.halves = nn.ModuleDict(), nodes, halves
        for node, source in edges(nodes):
            stride = 2 if halves and source < 2 else 1
            made = make(halves, (node, source), channels, stride)
            if made is not None:
                self.edges[f"{node}_{source}"] = made

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """Of the two cells before it."""
        states = [self.first(before), self.second(last)]
        for node in range(self.nodes):
            parts = [self.edges[f"{node}_{at}"](states[at]) for at in range(2 + node) if f"{node}_{at}" in self.edges]
            states.append(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
        return torch.cat(states[2:], 1)


class Cells(nn.Module):
    """Images to features [n, features]."""

    def __init__(self, config: CellsConfig, make: Make) -> None:
        super().__init__()
        width, channels = config.stem * config.channels, config.channels
        self.stem = nn.Sequential(*convolved(config.num_channels, width, 3, act=False))
        halving = {config.cells // 3, 2 * config.cells // 3}
        into, halved, cells = (width, width), False, list[nn.Module]()
        for number in range(config.cells):
            halves = number in halving
            channels = channels * 2 if halves else channels
            cells.append(Cell(config.nodes, into, channels, halves, halved, make))
            into, halved = (into[1], config.nodes * channels), halves
        self.cells, self.features = nn.ModuleList(cells), into[1]

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, height, width] -> [n, features]."""
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return functional.adaptive_avg_pool2d(last, 1).flatten(1)


class CellsForImageClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """``net`` and ``classifier``; a search gives other edges than the config names."""

    base_model_prefix = "net"
    config_class = CellsConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CellsConfig, make: Make | None = None) -> None:
        super().__init__(config)
        self.net = Cells(config, make or config.make)
        self.classifier = nn.Linear(self.net.features, config.num_labels or 1)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        """As torch draws them."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """``[n, channels, height, width]`` -> logits ``[n, num_labels]``; the cross-entropy of labels."""
        logits = self.classifier(self.net(pixel_values))
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def chosen(normal: Sequence[Sequence[Any]]) -> list[list[list[Any]]]:
    """Operations of each node as JSON has them."""
    return [[[int(at), str(name)] for at, name in node] for node in normal]


PART = CellsForImageClassification
