"""Named presets, and the two-line swap: what torch, bitsandbytes and torchao are called with is taken here."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import nybble.optim
from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.optim import REGISTRY, preset_names
from nybble.optim._common import FIXED
from nybble.quantizer import Quantizer

with warnings.catch_warnings():  # what it looks for at import is none of ours
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the peer: pip install bitsandbytes")

TORCHAO = "params, lr, betas, eps, weight_decay, amsgrad, block_size, bf16_stochastic_round"
"""Arguments of torchao 0.18's AdamW8bit, AdamW4bit, AdamWFp8, Adam8bit, Adam4bit and AdamFp8, in order."""


def optimizer(name: str) -> Any:
    return getattr(nybble.optim, name)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 64 * 96).view(shape or (64, 96)))


def stepped(made: Any) -> Any:
    for group in made.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    made.step()
    return made


# ------------------------------------------------------------------------------------------------------------ presets
def test_every_rule_has_them() -> None:
    rules = [part.__name__ for part in REGISTRY.all().values()]
    assert len(preset_names()) == 10 * len(rules)
    assert {"AdamW8bit", "AdamW4bit", "AdamWFp8", "Factor4bit", "SGD8bit", "Lion8bit", "Muon4bit"} <= {*preset_names()}
    for name in preset_names():
        kind = optimizer(name)
        assert kind.__name__ == name and kind is optimizer(name) and getattr(nybble.optim, kind.__qualname__) is kind
        stepped(kind([weight()], **({"momentum": 0.9} if "momentum" in inspect.signature(kind).parameters else {})))
    for name in ("AdamW3bit", "Nadam8bit", "8bit", "adamw8bit"):
        with pytest.raises(AttributeError, match=name):
            optimizer(name)


@pytest.mark.parametrize(
    ("name", "least", "signed", "nonnegative"),
    [
        ("AdamW8bit", 4096, "state8", "state8-unsigned"),
        ("AdamW4bit", 4097, "state4", "state4-unsigned"),
        ("AdamWFp8", 4096, "state-fp8", "state-fp8"),
        ("AdamWCompanded8bit", 4096, "state8-companded", "state8-companded-unsigned"),
    ],
)
def test_states(name: str, least: int, signed: str, nonnegative: str) -> None:
    """What each state is kept in, from how many elements on."""
    params = [weight(), nn.Parameter(torch.ones(least - 1)), nn.Parameter(torch.ones(least, 1))]
    made = stepped(optimizer(name)(params))
    kept = [made.state[p] for p in params]
    assert isinstance(kept[1]["exp_avg"], torch.Tensor)
    for entry in (kept[0], kept[2]):
        for state, line in (("exp_avg", signed), ("exp_avg_sq", nonnegative)):
            q = Quantizer(line)
            assert (entry[state].format, entry[state].granularity) == (q.format, q.granularity)


def test_vectors_of_four_bits() -> None:
    """Rank 1 falls back to blocks of 128, in the file too; exact bytes of m and v (sheet, check 3)."""
    p, bias = weight(), nn.Parameter(torch.ones(4100))
    made = stepped(optimizer("AdamW4bit")([p, bias]))
    saved = made.state_dict()
    assert saved["state"][0]["exp_avg_sq"]["quantizer"].startswith("linear4 rank1")
    assert saved["state"][1]["exp_avg_sq"]["quantizer"].startswith("linear4 flat=128")
    assert saved["state"][1]["exp_avg_sq"]["scale"].dtype == torch.float32
    n, vector = 64 * 96, 4100 // 2 + 4 * -(-4100 // 128)
    assert made.state_bytes() == {
        "exp_avg": n // 2 + 4 * n // 128 + vector,
        "exp_avg_sq": n // 2 + 4 * (64 + 96) + vector,
        "step": 8,
    }
    other = optimizer("AdamW4bit")([weight(), nn.Parameter(torch.ones(4100))])
    other.load_state_dict(saved)
    assert torch.equal(other.state_dict()["state"][1]["exp_avg_sq"]["codes"], saved["state"][1]["exp_avg_sq"]["codes"])


def test_factors_stay_float32() -> None:
    """Factor4bit: m in four bits, means of rows and columns in float32, a vector's v in blocks of 128."""
    p, bias = weight(), nn.Parameter(torch.ones(4100))
    made = stepped(optimizer("Factor4bit")([p, bias]))
    row, column = made.state[p]["exp_avg_sq_row"], made.state[p]["exp_avg_sq_col"]
    assert row.dtype == column.dtype == torch.float32 and row.shape == (64, 1) and column.shape == (1, 96)
    assert "exp_avg_sq" not in made.state[p] and made.state[bias]["exp_avg_sq"].codes.numel() == 2050
    assert made.state_bytes()["exp_avg_sq_row"] + made.state_bytes()["exp_avg_sq_col"] == 4 * (64 + 96)


# --------------------------------------------------------------------------------------------------------------- swaps
BNB = [
    *(name for name in dir(bitsandbytes.optim) if name.endswith(("8bit", "32bit")) or name.startswith("Paged")),
    *("Adam", "AdamW", "SGD", "Lion", "LAMB", "LARS", "RMSprop", "Adagrad"),
]


@pytest.mark.parametrize("name", [name for name in BNB if "AdEMAMix" not in name])
def test_bitsandbytes_arguments(name: str) -> None:
    """Every argument of theirs by name, and their defaults: none is refused, and the rule's are the same."""
    kind = optimizer(name)
    ours, theirs = inspect.signature(kind).parameters, inspect.signature(getattr(bitsandbytes.optim, name)).parameters
    assert theirs.keys() <= ours.keys()
    defaults = {key: p.default for key, p in theirs.items() if p.default is not p.empty}
    rule = [p for p in theirs if p in kind.options_type.__dataclass_fields__]
    assert [p for p in ours if p in rule] == rule  # the same places, so that they can be given by them
    assert {p: ours[p].default for p in rule if p in defaults} == {p: defaults[p] for p in rule if p in defaults}
    stepped(kind([weight()], **({"lr": 0.1} | defaults)))


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit", "Adam4bit", "AdamFp8"])
def test_torchaos_arguments(name: str) -> None:
    assert {*TORCHAO.split(", ")} <= inspect.signature(optimizer(name)).parameters.keys()
    p = nn.Parameter(torch.randn(64, 96).bfloat16())
    made = optimizer(name)([p], lr=1e-3, amsgrad=False, block_size=64, bf16_stochastic_round=True)
    assert made.param_groups[0]["weights"] == "stochastic"
    assert all("flat=64" in line and "scale_format=float32" in line for line in made.param_groups[0]["state"].values())
    p.grad = torch.ones_like(p)
    made.step()
    assert all(made.state[p][state].params.scale.numel() == 96 for state in ("exp_avg", "exp_avg_sq"))


def test_two_lines() -> None:
    """A training script whose import alone changes: torch's, bitsandbytes' and ours on one small problem."""
    losses = {}
    for source, kind in (
        ("torch", torch.optim.AdamW),
        ("bitsandbytes", bitsandbytes.optim.AdamW8bit),
        ("nybble", optimizer("AdamW8bit")),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 8))
        made = kind(model.parameters(), lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, amsgrad=False)
        x = torch.randn(128, 16)
        for _ in range(60):
            made.zero_grad()
            loss = (model(x) - x[:, :8].sin()).square().mean()
            torch.autograd.backward(loss)
            made.step()
        losses[source] = float(loss.detach())
    assert losses["nybble"] != losses["torch"]
    assert abs(losses["nybble"] / losses["torch"] - 1) < 0.05  # a few per cent, the sheet's bound
    assert abs(losses["nybble"] / losses["bitsandbytes"] - 1) < 0.05


def test_bits_choose_the_state() -> None:
    for bits, line in ((8, str(Quantizer("state8"))), (32, None)):
        made = optimizer("AdamW")([weight()], optim_bits=bits, min_8bit_size=7)
        assert made.param_groups[0]["state"]["exp_avg"] == line and made.param_groups[0]["min_size"] == 7
    for bits in (8, 32):  # theirs have 32 as a default without a meaning
        made = optimizer("AdamW8bit")([weight()], optim_bits=bits)
        assert made.param_groups[0]["state"]["exp_avg"] == str(Quantizer("state8"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AdamW", {"optim_bits": 4}, "optim_bits is 8 or 32.*state='state4'.*optim_bits=4"),
        ("AdamW8bit", {"optim_bits": 4}, "optim_bits is 8 here; got 4"),
        ("AdamW", {"optim_bits": 8, "state": "state4"}, "optim_bits is another name of state"),
        ("AdamW", {"min_8bit_size": 8, "min_size": 8}, "min_8bit_size is another name of min_size"),
        ("AdamW8bit", {"block_size": 0}, "block_size is a whole number >= 1; got 0"),
        ("AdamW8bit", {"block_size": 64.0}, "block_size is a whole number"),
        *(("AdamW8bit", {key: not FIXED[key][0]}, f"AdamW8bit has no {key}=") for key in FIXED),
        ("AdamW", {"percentile_clipping": 5}, "percentile_clipping=5"),
        ("AdamW", {"state": "state9"}, "Did you mean"),
        ("Muon8bit", {}, r"Muon8bit: it takes matrices; this parameter has shape \[3, 4, 512\].*AdamW8bit"),
        ("SGD", {"nesterov": True}, "nesterov needs a momentum > 0"),
        ("Adafactor", {"d": 0.5}, "d is a number >= 1; got 0.5"),
        ("Adafactor", {"beta2_decay": 0.8}, "beta2_decay is a number <= 0"),
        ("Adafactor", {"eps": 1e-8}, "eps"),
        ("RMSprop", {"alpha": 1.5}, "alpha"),
        ("LAMB", {"max_unorm": -1.0}, "max_unorm"),
        ("Lion", {"betas": (0.9, 1.0)}, "betas is 2 numbers"),
    ],
)
def test_bad_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        optimizer(name)([weight(3, 4, 512)], **options)


def test_an_argument_that_nobody_has() -> None:
    with pytest.raises(TypeError, match=r"AdamW8bit.__init__\(\) got an unexpected keyword argument 'beta'"):
        optimizer("AdamW8bit")([weight()], beta=0.9)


def test_centred_moments_are_not_rounded() -> None:
    with pytest.raises(SchemeError, match=r"centered takes the square.*square_avg.*leave centered out"):
        optimizer("RMSprop8bit")([weight()], centered=True)
    mixed = {"square_avg": None, "grad_avg": None, "momentum_buffer": "state8"}
    stepped(optimizer("RMSprop")([weight()], centered=True, momentum=0.9, state=mixed))


def test_foreign_states() -> None:
    """bitsandbytes' state dict is named as none of ours, and nothing changes."""
    p, q = weight(), weight()
    theirs = stepped(bitsandbytes.optim.AdamW8bit([p]))
    ours = optimizer("AdamW8bit")([q])
    with pytest.raises(
        FileError, match=r"__bnb_optimizer_quant_state__, step were saved; exp_avg, exp_avg_sq, step are kept here"
    ):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(FileError, match="exp_avg, exp_avg_sq, step were saved"):
        optimizer("Lion8bit")([q]).load_state_dict(stepped(optimizer("AdamW8bit")([p])).state_dict())
    assert not ours.state


def test_closures() -> None:
    """One function; a list of them (one for each parameter, or model) is refused before anything happens."""
    p = weight()
    made = optimizer("SGD8bit")([p], lr=0.1)
    before = p.detach().clone()
    for closure in ([lambda: 0.0], torch.tensor(1.0), True):
        with pytest.raises(UsageError, match="one function that evaluates the whole model"):
            made.step(closure)
    assert torch.equal(p, before)
    assert made.step(lambda: 2.5) == 2.5
