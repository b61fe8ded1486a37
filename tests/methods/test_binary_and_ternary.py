"""BiT and TBT whole: bits as machines multiply them, and from prepare to a file, learned thresholds too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import input_ids, logits, tiny_model, tiny_tokenizer
from torch import Tensor, nn

import nybble
from nybble.checkpoint.save import save
from nybble.core.errors import FileError, ModelError
from nybble.learned import ACTIVATIONS, Part, make_part
from nybble.learned.elastic import ElasticScale
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.layer import QuantLayer
from nybble.nn.linear import QuantLinear
from nybble.qtensor import QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.training.convert import convert
from nybble.training.prepare import learning_groups, prepare

TBT = {"center": "block", "mask": 1.0}
#: scheme, and parts with their options: W1A1 with thresholds, W2A2 without, W1A2 with a threshold a channel
SETTINGS: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, Any]]] = {
    "bit": (
        {"weights": "binary tensor scale=mean", "inputs": "binary tensor static scale=elastic"},
        {"center": "tensor", "raw": True},
        {},
    ),
    "bit, a threshold a channel": (
        {"weights": "binary tensor scale=mean", "inputs": "int2_full tensor static scale=elastic"},
        {"center": "tensor", "raw": True},
        {"threshold": "channel"},
    ),
    "tbt": (
        {"weights": "ternary channel scale=max-entropy", "inputs": "ternary tensor static scale=elastic"},
        TBT,
        {"threshold": "none"},
    ),
}


def parts(setting: str) -> dict[str, str | Part]:
    _, weights, inputs = SETTINGS[setting]
    return {"weights": make_part("statistics", weights), "inputs": make_part("elastic", inputs)}


def run(model: nn.Module) -> None:
    model(input_ids=input_ids(), use_cache=False)


def trained(setting: str, dtype: torch.dtype, steps: int = 4) -> Any:
    model = prepare(
        tiny_model("llama", dtype, tie_word_embeddings=False), SETTINGS[setting][0], parts(setting), run=run
    )
    optimizer = torch.optim.Adam(learning_groups(model, {}), lr=0.02)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=input_ids(), labels=input_ids(), use_cache=False).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_file_computes_what_training_computed(setting: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(setting, dtype)
    found = [m for m in model.modules() if isinstance(m, ElasticScale)]
    if setting != "tbt":
        assert found and all(m.threshold is not None and m.threshold.count_nonzero() for m in found)
    expected = logits(model)
    convert(model)
    assert torch.equal(logits(model), expected)
    folder = save(model, tmp_path / "out", tiny_tokenizer())
    loaded, _ = nybble.load(folder)
    assert torch.equal(logits(loaded), expected)
    layers = [m for m in loaded.modules() if isinstance(m, QuantLayer)]
    assert layers and all(m.inputs is not None and m.inputs.relearned == (setting != "tbt") for m in layers)
    shift = next(m.inputs.state_dict().get("shift") for m in layers if m.inputs is not None)
    assert (shift is None) if setting == "tbt" else shift is not None and shift.shape == found[0].threshold.shape  # type: ignore[union-attr]


def test_no_target_forgets_a_threshold(tmp_path: Path) -> None:
    """Files that can't say it are refused, by name; dense ones have activations in float anyhow."""
    model = trained("bit", torch.float32, 1)
    convert(model)
    folder = save(model, tmp_path / "out", tiny_tokenizer())
    for target in ("onnx", "compressed-tensors", "gguf"):
        with pytest.raises(ModelError, match=r"learned thresholds of activations.*threshold: none"):
            nybble.export(folder, tmp_path / target, target)
        assert not (tmp_path / target).exists()
    nybble.export(folder, tmp_path / "dense", "dense")
    assert (tmp_path / "dense" / "config.json").exists()


def test_a_threshold_is_described() -> None:
    """Its width in the description, and what is wrong with one."""
    quantizer = Quantizer("uint1 tensor static")
    for columns in (1, 5):
        shift = torch.linspace(0.1, 1, columns)
        params = QuantParams(torch.tensor([0.5]), shift=shift)
        one = ActivationQuantizer(quantizer, params)
        other = ActivationQuantizer.from_dict(one.to_dict())
        other.load_state_dict(one.state_dict())
        x = torch.rand(3, 5)
        assert torch.equal(one(x), other(x)) and one.roles()["shift"] == "offsets"
        expected = 0.5 * ((x - shift) / 0.5).clamp(0, 1).round()
        assert torch.equal(one(x), expected)
        x.requires_grad_()
        one(x).sum().backward()  # what trains in front of packed layers
        assert x.grad is not None and 0 < x.grad.count_nonzero() < 15 and torch.equal(one(x), expected)
    for columns_said in (0, "5"):
        with pytest.raises(FileError, match="number of columns"):
            ActivationQuantizer.from_dict({**one.to_dict(), "columns": columns_said})


def test_products_of_whole_numbers_know_no_threshold() -> None:
    """A layer whose activations are 8 bits with a threshold computes what it would in float."""
    weight, x = Quantizer("int8 channel").quantize(torch.randn(16, 32)), torch.randn(4, 32)
    params = QuantParams(torch.tensor([0.02]), shift=torch.tensor([0.7]))
    inputs = ActivationQuantizer(Quantizer("int8 tensor static"), params)
    assert not inputs.whole and not inputs.few
    found = QuantLinear(weight, None, inputs)(x)
    rounded = ((x - 0.7) / 0.02).round().clamp(-127, 127) * 0.02
    torch.testing.assert_close(found, rounded @ weight.dequantize().T)


# ------------------------------------------------------------------------------------------ one bit, as it is stored
def bits(rows: BlockQTensor) -> np.ndarray:
    """uint8 [rows, bytes]: the packed codes, as they are in a file."""
    return rows.codes.numpy().reshape(rows.shape[0], -1)


def popcount(words: np.ndarray) -> np.ndarray:
    """int64, of the last dimension."""
    found: np.ndarray = np.unpackbits(words, axis=-1).sum(-1, dtype=np.int64)
    return found


def settled(fmt: str, x: Tensor, threshold: float) -> BlockQTensor:
    """Activations that elastic settled."""
    part = make_part("elastic", {}).make(Quantizer(f"{fmt} tensor static scale=elastic"), x, side=ACTIVATIONS)
    assert isinstance(part, ElasticScale) and part.threshold is not None
    with torch.no_grad():
        part.threshold.fill_(threshold)
    return part.quantizer.quantize(x, part.fixed())


@pytest.mark.parametrize("columns", [8, 64, 1000])
def test_popcounts_are_the_float_product(columns: int) -> None:
    """XNOR for signs by signs, AND for {0, 1} by signs, over the bytes of the file: equal, exactly, in float64."""
    generator = torch.Generator().manual_seed(columns)
    w = torch.randn(6, columns, generator=generator)
    packed = (
        make_part("statistics", {"center": "tensor", "raw": True}).make(Quantizer("binary scale=mean"), w).settle(w)
    )
    assert isinstance(packed, BlockQTensor) and packed.codes.numel() == 6 * columns // 8
    signs, scale = bits(packed)[None], float(packed.params.scale.item())  # type: ignore[union-attr]
    x = torch.randn(5, columns, generator=generator)
    for fmt, given in (("binary", x), ("uint1", x.relu())):
        rows = settled(fmt, given, 0.0625)
        mine = bits(rows)[:, None]
        if fmt == "binary":
            counts = columns - 2 * popcount(mine ^ signs)
        else:
            counts = 2 * popcount(mine & signs) - popcount(mine)
        exact = rows.dequantize(torch.float64) @ packed.dequantize(torch.float64).T
        factor = float(rows.params.scale.item()) * scale  # type: ignore[union-attr]  # 48 bits: sums of it are exact
        assert np.array_equal(exact.numpy(), counts * factor)
        assert len(np.unique(counts)) > 3
