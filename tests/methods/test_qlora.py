"""QLoRA's sheet: NF4 with double quantization in bytes and errors, and PEFT over bitsandbytes' layers as the peer.

Its table and encoder are in tests/parts/formats/test_normal_float.py, its errors in tests/numerics/test_statistics.py,
what trains in tests/parts/training/test_qlora.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.models.layouts import test_bitsandbytes as theirs
from tests.tiny import input_ids, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import nybble
from nybble.core.errors import DataError, FileError, NybbleError, UsageError
from nybble.data.instructions import collate
from nybble.pipelines.request import build_recipe
from nybble.qtensor import from_spec
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.training.settings import TrainSettings

with warnings.catch_warnings():  # what it looks for at import is none of ours
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional", reason="the peer: pip install bitsandbytes")

LINE = "nf4-bnb-dq"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7,), (3, 65), (64,), (129, 130), (16384 + 1,)])
def test_values_come_back_as_their_codes(shape: tuple[int, ...]) -> None:
    """Odd lengths and ragged blocks of both levels; a weight on the grid is its own rounding, with one level."""
    once = Quantizer("nf4-bnb").quantize(drawn(*shape))
    again = Quantizer("nf4-bnb").quantize(once.dequantize())
    assert torch.equal(once.dequantize(), again.dequantize())
    assert torch.equal(once.unpacked(), again.unpacked()) and once.unpacked().shape == shape


@pytest.mark.parametrize("n", [64 * 256, 64 * 256 * 3 + 64 * 5 + 11, 1001])
def test_bytes(n: int) -> None:
    """Half a byte a weight, one a block of 64, a float32 for 256 of these, and the mean."""
    found = Quantizer(LINE).quantize(drawn(n))
    blocks = -(-n // 64)
    assert found.nbytes() == -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4


def test_the_constants_lose_little() -> None:
    """Below 1 % of a typical constant, and the weight's error is that of one level."""
    x = drawn(1024, 1024) * 0.02
    one, two = (Quantizer(line).quantize(x) for line in ("nf4-bnb", LINE))
    exact, nested = one.params.scale, two.params.scale
    assert isinstance(exact, Tensor) and isinstance(nested, BlockQTensor)
    error = (nested.dequantize().flatten() / exact.flatten() - 1).abs()
    assert error.mean() < 0.01 and error.max() < 0.04
    losses = [float((t.dequantize() - x).square().mean()) for t in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_bytes_of_bitsandbytes() -> None:
    """Codes and both levels of constants; its 8-bit codes are looked up in cells, so some fall beside the nearest."""
    x = drawn(130, 192) * 0.02
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = Quantizer(LINE).quantize(x)
    assert isinstance(ours.params.scale, BlockQTensor)
    flat = packed.flatten()
    assert torch.equal(ours.unpacked().flatten(), torch.stack([flat >> 4, flat & 15], 1).flatten())
    nested = ours.params.scale
    assert isinstance(nested.params.offset, Tensor) and isinstance(nested.params.scale, Tensor)
    assert float(nested.params.offset) == pytest.approx(float(state.offset), rel=2e-7)  # a sum in another order
    assert torch.allclose(nested.params.scale.flatten(), state.state2.absmax, rtol=1e-6)
    codes = nested.unpacked().flatten().int()
    apart = (codes - state.absmax.flatten().int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.05


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs.checkpoint(tmp_path_factory.mktemp("bnb"), theirs.CASES["nf4 nested"])[0]


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs PEFT, which nybble's extra 'train' brings")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    found = peft.get_peft_model(model.requires_grad_(False), config)
    for name, p in found.named_parameters():
        if p.requires_grad:
            p.data = 0.2 * drawn(*p.shape, seed=sum(map(ord, name)))
    return found.train()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_peft_over_bitsandbytes_layers(written: Path) -> None:
    """The same codes under both: the loss, and the gradient of every A and B, in float32."""
    auto: Any = AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = adapted(auto.from_pretrained(written, dtype=torch.float32, device_map="cpu"))
    ours = adapted(nybble.load(written, dtype="float32")[0])
    found = []
    for model in (peer, ours):
        loss = model(input_ids=input_ids(), labels=input_ids(), use_cache=False).loss
        loss.backward()
        found.append((float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (wanted, gradients), (loss, own) = found
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert own.keys() == gradients.keys() and len(own) == 28
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_updates_have_examples_of_about_one_length() -> None:
    loop = pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")
    lengths = torch.randint(2, 500, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = loop._ByLength(lengths, TrainSettings(batch=2, accumulate=8))
    first = list(sampler)
    assert sorted(first) == list(range(640)) and first == list(sampler)

    def spread(order: list[int]) -> float:
        updates = torch.tensor([lengths[i] for i in order]).double().view(-1, 16)
        return float(updates.std(1).mean())

    assert spread(first) < spread(list(range(640))) / 8
    assert lengths[first[0]] == max(lengths)  # what takes most memory comes first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_the_loss_is_of_targets_alone() -> None:
    """As a batch is collated and a model calculates it."""
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
        {"input_ids": [9, 8, 7], "labels": [-100, 8, 7]},
    ]
    batch = collate(rows)
    logits = drawn(2, 5, 20)
    found = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    chosen = [(0, 1, 7), (0, 2, 8), (0, 3, 9), (1, 0, 8), (1, 1, 7)]
    by_hand = -sum(float(logits[row, at].log_softmax(0)[token]) for row, at, token in chosen) / len(chosen)
    assert float(found) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = tiny_model()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[3, 4] = value
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
        nybble.quantize(model, build_recipe("rtn", weights=LINE))


def test_bad_input() -> None:
    for line, message in (("nf9 flat=64", "nf9"), ("nf4 flat=0", "at least one element"), ("nf4 flat=x", "flat")):
        with pytest.raises(NybbleError, match=message):
            Quantizer(line)
    with pytest.raises(NybbleError, match="train in bfloat16 or float32"):
        TrainSettings(dtype="float16")
    wrong: dict[str, Any] = {"lr": 0.0, "clip": -1.0, "warmup": 1.5}
    for name, bad in wrong.items():
        message = "share from 0 to 1" if name == "warmup" else "number above 0"
        with pytest.raises(UsageError, match=f"{name} is {bad}; it must be a {message}"):
            TrainSettings(**{name: bad})
    assert TrainSettings(warmup=0.0).warmup == 0
    record = Quantizer(LINE).quantize(drawn(2, 64))
    with pytest.raises(FileError, match="codes"):
        from_spec(record.spec(), {**record.tensors(), "codes": torch.zeros(7, dtype=torch.uint8)})
