"""The two networks of the paper: ResNet8 for images, DS-CNN for spoken commands; without weights.

A norm of one sample trains on the device from scratch. BatchNorm is for networks that were trained elsewhere: their
export folds it, and what learns then is the convolution with its factors in it.
"""

from __future__ import annotations

from torch import Tensor, nn

from nybble.core.errors import UsageError, did_you_mean

NETWORKS = ("resnet8", "ds-cnn")
NORMS = ("instance", "batch", "none")


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside an identity, or a 1 x 1 convolution where the shape changes."""

    def __init__(self, into: int, out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride, 1, bias=norm == "none")
        self.first_norm, self.relu = _norm(norm, out), nn.ReLU()
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=norm == "none")
        self.second_norm = _norm(norm, out)
        self.beside = nn.Conv2d(into, out, 1, stride) if stride > 1 or into != out else nn.Identity()
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[n, in, h, w]`` -> ``[n, out, h / stride, w / stride]``."""
        y = self.second_norm(self.second(self.relu(self.first_norm(self.first(x)))))
        found: Tensor = self.last(y + self.beside(x))
        return found


def resnet8(channels: int = 3, classes: int = 10, width: int = 16, norm: str = "instance") -> nn.Sequential:
    """Eight layers on the longest way, three stages of ``width``, twice and four times as many channels.

    Args:
        channels: of an image.
        classes: that it tells apart.
        width: channels of the first stage.
        norm: one of :data:`NORMS`.

    Raises:
        UsageError: no such norm. Source: MLPerf Tiny (arXiv:2106.07597), after He et al. 2016.
    """
    stem = (nn.Conv2d(channels, width, 3, 1, 1, bias=norm == "none"), _norm(norm, width), nn.ReLU())
    stages = (
        Residual(width, width, 1, norm), Residual(width, 2 * width, 2, norm), Residual(2 * width, 4 * width, 2, norm)
    )  # fmt: skip
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def ds_cnn(channels: int = 1, classes: int = 12, width: int = 64, norm: str = "instance") -> nn.Sequential:
    """A convolution of 10 x 4, four pairs of a depthwise and a pointwise one, the mean, a linear layer.

    Args:
        channels: of an image.
        classes: that it tells apart.
        width: channels of all layers.
        norm: one of :data:`NORMS`.

    Its usual image is 49 frames of 10 coefficients (MFCC); 25 x 5 remain.

    Raises:
        UsageError: no such norm. Source: Zhang et al. 2017, arXiv:1711.07128; MLPerf Tiny.
    """
    bias = norm == "none"
    layers: list[nn.Module] = [nn.ZeroPad2d((1, 1, 4, 5)), nn.Conv2d(channels, width, (10, 4), 2, bias=bias)]
    layers += [_norm(norm, width), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=bias), _norm(norm, width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 1, bias=bias), _norm(norm, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def build(name: str, channels: int, classes: int, width: int, norm: str) -> nn.Sequential:
    """One of :data:`NETWORKS`; a width of 0 is its own.

    Raises:
        UsageError: no such network, or norm.
    """
    if name not in NETWORKS:
        raise UsageError(f"no network {name!r}.{did_you_mean(name, NETWORKS)}")
    if name == "resnet8":
        return resnet8(channels, classes, width or 16, norm)
    return ds_cnn(channels, classes, width or 64, norm)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind not in NORMS:
        raise UsageError(f"no norm {kind!r}.{did_you_mean(kind, NORMS)}")
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()
