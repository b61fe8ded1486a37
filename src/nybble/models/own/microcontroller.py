"""The networks of :mod:`nybble.microcontroller.networks` as models of transformers, so that folders can hold them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from nybble.microcontroller.networks import build


class MicrocontrollerConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Of ResNet8 or DS-CNN.

    Attributes:
        network: ``resnet8`` or ``ds-cnn``. num_channels, image_size: of an image, height and width.
        width: channels of the first stage, 0 for the network's own. norm: ``instance``, ``batch`` or ``none``.
        c_train: options of the export target of that name.
    """

    model_type = "nybble-microcontroller"

    def __init__(self, **options: Any) -> None:
        self.network: str = options.pop("network", "resnet8")
        self.num_channels: int = options.pop("num_channels", 1)
        self.image_size: list[int] = list(options.pop("image_size", (28, 28)))
        self.width: int = options.pop("width", 0)
        self.norm: str = options.pop("norm", "instance")
        self.c_train: dict[str, Any] = dict(options.pop("c_train", {}))
        super().__init__(**options)


class MicrocontrollerForImageClassification(PreTrainedModel):
    """``net`` and ``classifier``, called as models of transformers are."""

    base_model_prefix = "net"
    config_class = MicrocontrollerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MicrocontrollerConfig) -> None:
        super().__init__(config)
        classes = config.num_labels or 1
        *net, self.classifier = build(config.network, config.num_channels, classes, config.width, config.norm)
        self.net = nn.Sequential(*net)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        """Torch's own are what the networks have."""

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """``[n, channels, height, width]`` -> logits ``[n, num_labels]``."""
        return ImageClassifierOutput(logits=self.classifier(self.net(pixel_values)))


PART = MicrocontrollerForImageClassification
