"""A chain of searched blocks: a stem, blocks in stages, a 1 x 1 convolution, the mean, a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from nybble.models.operations import convolved, make_operation

Make = Callable[[int, int, int, int], nn.Module]
"""A block by its number, channels before and behind, and stride."""


class ChainConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes.

    Attributes:
        num_channels, image_size: of an image, height and width.
        stem, stem_stride: channels of the first convolution, 3 x 3. head: of the last one, 1 x 1.
        stages: of each channels, blocks, and the stride of its first block.
        operations: of each block, from :mod:`nybble.models.operations`.
    """

    model_type = "nybble-chain"

    def __init__(self, **options: Any) -> None:
        self.num_channels: int = options.pop("num_channels", 3)
        self.image_size: list[int] = list(options.pop("image_size", (224, 224)))
        self.stem: int = options.pop("stem", 16)
        self.stem_stride: int = options.pop("stem_stride", 2)
        self.head: int = options.pop("head", 1024)
        self.stages: list[list[int]] = [list(stage) for stage in options.pop("stages", [[64, 1, 2]])]
        self.operations: list[str] = list(options.pop("operations", []))
        super().__init__(**options)

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        """Of each block: channels before and behind, and stride."""
        into = self.stem
        for channels, count, stride in self.stages:
            for number in range(count):
                yield into, channels, stride if number == 0 else 1
                into = channels


class Chain(nn.Module):
    """Images to features [n, head]; ``make`` gives the blocks."""

    def __init__(self, config: ChainConfig, make: Make) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convolved(config.num_channels, config.stem, 3, config.stem_stride))
        shapes = list(config.shapes())
        self.blocks = nn.ModuleList(make(number, *shape) for number, shape in enumerate(shapes))
        self.head = nn.Sequential(*convolved(shapes[-1][1], config.head, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, height, width] -> [n, head]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


class ChainForImageClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """``net`` and ``classifier``; a search gives other blocks than the config names."""

    base_model_prefix = "net"
    config_class = ChainConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ChainConfig, make: Make | None = None) -> None:
        super().__init__(config)
        names = config.operations
        self.net = Chain(config, make or (lambda number, *shape: make_operation(names[number], *shape)))
        self.classifier = nn.Linear(config.head, config.num_labels or 1)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        """As torch draws them."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """``[n, channels, height, width]`` -> logits ``[n, num_labels]``; the cross-entropy of labels."""
        logits = self.classifier(self.net(pixel_values))
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


PART = ChainForImageClassification
