"""Weights that a model's code reads stay in float and are named; the result runs once before it is called done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import FAMILIES, tiny_model
from torch import nn

import nybble
from nybble.core.errors import ModelError, SchemeError
from nybble.nn.linear import QuantLinear
from nybble.nn.read_weights import read_weights
from nybble.pipelines.request import build_recipe
from nybble.training.prepare import prepare

RTN = build_recipe("rtn", weights="int8 channel")
MAMBA = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def mamba() -> Any:
    make: Any = transformers.MambaConfig
    return transformers.MambaForCausalLM(make(**MAMBA))


class Encoder(nn.Module):
    """torch's own layer, whose fast path in evaluation mode takes all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 5)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.layers(self.embed(x.flatten(2).mT)).mean(1))
        return y


def quantized(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def test_what_is_read() -> None:
    assert read_weights(nn.MultiheadAttention(8, 2)) == {"out_proj"}
    layer = nn.TransformerEncoderLayer(8, 2)
    assert read_weights(layer) >= {"linear1", "linear2", "self_attn.out_proj"}
    assert {name.rpartition(".")[2] for name in read_weights(mamba())} == {"dt_proj", "conv1d"}
    # Bloom reads its own in a branch that the config rules out, or doesn't.
    assert read_weights(tiny_model("bloom")) == set()
    slow = tiny_model("bloom", pretraining_tp=2, slow_but_exact=True)
    assert {name.rpartition(".")[2] for name in read_weights(slow)} == {"dense", "dense_4h_to_h"}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_decoder_is_read(family: str) -> None:
    assert read_weights(tiny_model(family)) == set()


def test_they_stay_in_float_and_are_named(tmp_path: Path) -> None:
    mamba().save_pretrained(tmp_path / "float")
    lines: list[str] = []
    nybble.quantize(tmp_path / "float", RTN, out=tmp_path / "out", announce=lines.append)
    (line,) = [line for line in lines if line.startswith("left in float, as the model's code reads")]
    assert "backbone.layers.0.mixer.dt_proj, backbone.layers.1.mixer.dt_proj" in line
    loaded = nybble.load(tmp_path / "out")[0]
    assert quantized(loaded) == {"in_proj", "x_proj", "out_proj"}
    assert loaded(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_torchs_own_attention() -> None:
    torch.manual_seed(0)
    net, x = Encoder().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = net(x)
        nybble.quantize(net, RTN)
        assert quantized(net) == {"embed", "head"}
        torch.testing.assert_close(net(x), expected, rtol=0.05, atol=0.02)
    with pytest.raises(SchemeError, match=r"out_proj: the model's code reads its weight instead of calling it"):
        prepare(Encoder(), {"weights": "int8 channel"})
    with pytest.raises(SchemeError, match=r"is left to it.*can't be quantized"):
        nybble.quantize(nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32)), RTN)


@pytest.mark.parametrize("kept", [False, True])
def test_a_result_that_cannot_run_is_none(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were they not known, the trial would find them."""
    monkeypatch.setattr("nybble.walk.plan.read_weights", lambda model: set())
    model = tiny_model("bloom", dtype=torch.float32, pretraining_tp=2, slow_but_exact=True)
    model.save_pretrained(tmp_path / "float")
    out = None if kept else tmp_path / "out"
    with pytest.raises(ModelError, match=r"fails in a trial .*Packed.*Leave it in float"):
        nybble.quantize(tmp_path / "float", RTN, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
    with pytest.raises(ModelError, match=r"fails in a trial .*Packed.*Leave it in float"):
        nybble.quantize_many(str(tmp_path / "float"), {"one": RTN})


class Pair(nn.Module):
    """Two inputs, which nobody could guess."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x + y)
        return out


@pytest.mark.parametrize("data", ["builtin", torch.zeros(3, 3, 8, 8)], ids=["guessed", "given"])
def test_a_plain_network_is_tried_without_calibration(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its first layer's input, or by data that no step asks for, where the float network takes it."""
    assert "untried" not in nybble.quantize(Encoder(), RTN, data)[1].manifest
    monkeypatch.setattr("nybble.walk.plan.read_weights", lambda model: set())
    net = Encoder()
    with pytest.raises(ModelError, match=r"fails in a trial .*Packed.*Leave it in float"):
        nybble.quantize(net, RTN, data)
    assert quantized(net) == set()


def test_what_was_not_tried_is_said() -> None:
    """A matrix of another width is an input that the float network refuses too: no fault of the quantizing."""
    lines: list[str] = []
    for data in ("builtin", torch.zeros(3, 5)):
        _, report = nybble.quantize(Pair(), RTN, data, announce=lines.append)
        assert report.manifest["untried"] == lines[-1]
        assert lines[-1].startswith("the quantized Pair was not tried out: nothing says what it is called with.")
