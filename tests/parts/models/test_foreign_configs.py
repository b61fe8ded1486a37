"""Plain networks that keep settings of their own under the name ``config``."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.core.errors import UsageError
from nybble.data import ImageSamples
from nybble.pipelines.evaluate import run_eval
from nybble.training.convert import convert
from nybble.training.prepare import prepare


@dataclass(frozen=True)
class Options:
    """Frozen: who writes into it fails."""

    model_type: str = "llama"
    vocab_size: int = 3


class Open:
    """As omegaconf's: any name is there, and None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


CONFIGS = {
    "none": None,
    "dict": {"model_type": "llama", "hidden": 8},
    "dataclass": Options(),
    "namespace": Namespace(model_type="bert", vocab_size=2, use_cache=True, num_channels=1, tie_word_embeddings=True),
    "open": Open(),
    "type": Options,
    "unhashable": Namespace(model_type=["llama"]),
}


class Plain(nn.Module):
    """Images -> logits."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
        self.block.config = config
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(self.conv(x)).mean((2, 3)))
        return y


def made(name: str) -> Plain:
    torch.manual_seed(0)
    return Plain(copy.copy(CONFIGS[name])).eval()


def images() -> Tensor:
    return torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_the_networks_that_they_are(name: str) -> None:
    """The float network by hand: fake-quantized weights, as without any config."""
    network, x, quantizer = made(name), images(), nybble.Quantizer("int4 channel")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = quantizer.fake_quantize(module.weight)
    wanted = network(x)
    rounded, report = nybble.quantize(made(name), {"scheme": {"weights": "int4 channel"}, "steps": [{"solver": "rtn"}]})
    assert type(rounded) is Plain and len(report.layers) == 3
    assert torch.allclose(rounded(x), wanted, atol=1e-5)
    calibrated, _ = nybble.quantize(made(name), "gptq", {"pixel_values": x}, weights="int4 channel")
    assert not torch.equal(calibrated(x), rounded(x))
    samples = ImageSamples(pixel_values=x, labels=None, sha256="", available=6, source="random", note="")
    found = run_eval({"rounded": rounded}, samples, reference=made(name))
    agreement = (rounded(x).argmax(-1) == made(name)(x).argmax(-1)).double().mean()
    assert found["models"] == {"rounded": {"agreement": float(agreement)}}
    with pytest.raises(UsageError, match="Plain is a plain network: no config says how to build it again"):
        nybble.save(rounded, "nowhere")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_trained_as_such(name: str) -> None:
    x, network = images(), prepare(made(name), {"weights": "int4 channel"})
    wanted = network(x)
    assert torch.equal(convert(network)(x), wanted)
