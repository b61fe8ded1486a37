"""DiffQ: its sheet's checks of bits, noise, gradients, sizes and files; the recipe end to end.

Défossez et al. 2021, arXiv:2104.09987. Sizes are the formula's own numbers, gradients finite differences.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, logits, save_text, save_tiny, tiny_model
from torch import Tensor

import nybble
from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.learned.pseudo_noise import NoisyWeight, PseudoNoise
from nybble.nn.fake import FakeLayer, penalty_of
from nybble.nn.packed import Packed
from nybble.pipelines.train import train
from nybble.qtensor.mixed_bits import MOST, MixedBits
from nybble.quantizer import Quantizer
from nybble.training.convert import convert
from nybble.training.prepare import learning_groups, prepare
from nybble.training.settings import TrainSettings

EIGHT = Quantizer("uint8 scale=minmax(offset=true)")
SCHEME = {"weights": "uint8 scale=minmax(offset=true)"}


def learned(x: Tensor, line: Quantizer = EIGHT, **options: Any) -> NoisyWeight:
    found = PseudoNoise(**options).make(line, x)
    assert isinstance(found, NoisyWeight)
    return found


def weight(rows: int = 64, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- bits and noise
@pytest.mark.parametrize("bits", ["linear", "noise"])
@pytest.mark.parametrize("begin", [3, 6, 8])
def test_bits_begin_as_the_formats_and_stay_inside(bits: str, begin: int) -> None:
    made = learned(weight(), Quantizer(f"uint{begin} scale=minmax(offset=true)"), bits=bits, most=14)
    assert made.bits().shape == (512,)
    torch.testing.assert_close(made.bits(), torch.full((512,), float(begin)), rtol=0, atol=1e-5)
    with torch.no_grad():
        made.logits.copy_(torch.linspace(-8, 8, 512))
    found = made.bits()
    assert ((found > 2) & (found < 14)).all() and (found.diff() > 0).all()
    assert made.widths().min() == 2 and made.widths().max() == 14


@pytest.mark.parametrize(("noise", "deviation"), [("gaussian", 1 / 2), ("uniform", 1 / math.sqrt(12))])
def test_noise(noise: str, deviation: float) -> None:
    x = weight(512, 512)
    made = learned(x, noise=noise).train()
    with torch.no_grad():
        made.logits.view(-1, 2)[:, 1] -= 1  # half of the groups have fewer bits
    before, found = x.clone(), made(x).detach()
    assert torch.equal(x, before) and not torch.equal(found, made(x))
    step = (x.max() - x.min()) / (2 ** made.bits().detach() - 1)
    in_steps = (found - x).view(-1, 8) / step[:, None]
    for part in (in_steps[::2], in_steps[1::2]):
        assert abs(float(part.mean())) < 5 * deviation / math.sqrt(part.numel())
        assert float(part.std()) == pytest.approx(deviation, rel=0.01)
    if noise == "uniform":
        assert in_steps.abs().max() < 0.51


# ------------------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("bits", ["linear", "noise"])
def test_gradients_are_those_of_the_noisy_weight(bits: str) -> None:
    """Under noise that stands still: the estimate's own, against differences of the formula in float64."""
    x, target = weight(4, 8), weight(4, 8, 1)
    made = learned(x, bits=bits, group=8)

    def draw() -> Tensor:
        torch.manual_seed(3)
        return torch.empty(4, 8).normal_(0, 0.5)

    noise = draw().double()

    def loss(w: Tensor, logits: Tensor) -> Tensor:
        t, (small, large) = torch.sigmoid(logits), (1 / (2.0**15 - 1), 1 / 3)
        steps = 1 / (2 ** (2 + 13 * t) - 1) if bits == "linear" else small**t * large ** (1 - t)
        noisy = w + (w.max() - w.min()) * steps[:, None] * noise
        return (noisy * target.double()).sum() + noisy.square().sum()

    w = x.clone().requires_grad_()
    torch.manual_seed(3)
    noisy = made.train()(w)
    ((noisy * target).sum() + noisy.square().sum()).backward()
    at = (x.double(), made.logits.detach().double())
    for place, found in ((0, w.grad), (1, made.logits.grad)):
        assert found is not None
        for i in range(0, found.numel(), 3):
            ends = []
            for sign in (1, -1):
                moved = [t.clone() for t in at]
                moved[place].view(-1)[i] += sign * 1e-5
                ends.append(loss(*moved))
            expected = (ends[0] - ends[1]) / 2e-5
            assert float(found.reshape(-1)[i]) == pytest.approx(float(expected), rel=2e-4, abs=2e-4)


def test_the_range_has_a_gradient_where_aminmax_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch before 2.12: it reaches the largest weight and the smallest, with opposite signs."""

    class _Underived(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.amin(), x.amax()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise NotImplementedError("the derivative for aminmax is not implemented")

    for place in (torch, Tensor):
        monkeypatch.setattr(place, "aminmax", _Underived.apply)
    x = weight(4, 8).requires_grad_()
    made = learned(x)
    made.train()(x).sum().backward()
    assert x.grad is not None
    moved = (x.grad - 1).flatten()
    ends = {int(x.argmin()), int(x.argmax())}
    assert set(moved.nonzero().flatten().tolist()) == ends and abs(float(moved.sum())) < 1e-6


def test_the_range_can_be_left_out_of_the_gradient() -> None:
    x = weight(4, 8).requires_grad_()
    made = learned(x, range_gradient=False)
    made.train()(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------- size
@pytest.mark.parametrize(
    ("group", "bits", "expected"), [(16, 4, 0.515634), (8, 8, 1.046884), (1, 8, 1.375009), (8, 2, 0.250009)]
)
def test_soft_size_of_a_million_weights(group: int, bits: int, expected: float) -> None:
    made = learned(torch.zeros(1 << 10, 1 << 10), group=group, penalty=3.0)
    with torch.no_grad():
        made.logits.fill_(-math.inf if bits == 2 else PseudoNoise().logit(bits))
    assert float(made.size().detach()) == pytest.approx(expected, abs=1e-6)
    assert float(made.penalty(0.5).detach()) == pytest.approx(3 * expected, abs=1e-5)
    stored = made.settle(torch.zeros(1 << 10, 1 << 10)).nbytes()
    assert stored == pytest.approx(float(made.size().detach()) * 2**20, abs=8)


def test_the_penalty_takes_bits_and_nothing_takes_them_without() -> None:
    sizes = []
    for penalty in (0.0, 100.0, 1000.0, 10000.0):
        torch.manual_seed(0)
        made, x = learned(weight(), penalty=penalty).train(), weight()
        optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
        for _ in range(30):
            optimizer.zero_grad()
            ((made(x) - x).square().mean() + made.penalty(0)).backward()
            optimizer.step()
        sizes.append(made.settle(x).nbytes())
    assert sizes == sorted(sizes, reverse=True) and sizes[0] >= learned(weight()).settle(weight()).nbytes()
    assert sizes[-1] < 0.5 * sizes[0]


# ---------------------------------------------------------------------------------------------------------------- files
def test_levels_of_all_widths_are_kept() -> None:
    """Of 1 to 15 bits in one tensor: values by the formula, bytes by the true size."""
    x, bits = weight(60, 64), torch.arange(480) % MOST + 1
    found = MixedBits.make(x, bits)
    top = 2.0 ** bits.double() - 1
    low, high = float(x.min()), float(x.max())
    level = ((x.double().view(480, 8) - low) / (high - low) * top[:, None]).round()
    off = (found.dequantize().view(480, 8).double() - low - (high - low) * level / top[:, None]).abs()
    exact = off < 1e-5 * (high - low) / top[:, None].clamp(max=100)
    assert exact.double().mean() > 0.99  # in float32 a tie may fall to the other side
    assert (off < 1.01 * (high - low) / top[:, None]).all()
    true = (8 * int(bits.sum()) + 64 + 8 + 4 * 480) / 8
    assert true - 1 <= found.nbytes() <= true + 2 * MOST
    assert len(gzip.compress(bytes(found.codes.tolist()))) <= found.nbytes() + 100
    found.validate()


def test_a_constant_tensor_stays_and_nan_is_refused() -> None:
    same = torch.full((4, 8), 0.3)
    made = learned(same)
    assert torch.equal(made.eval()(same), same)
    assert torch.equal(made.train()(same), same)
    with pytest.raises(SchemeError, match="finite"):
        learned(same.clone().fill_(math.nan))
    with pytest.raises(SchemeError, match="finite"):
        MixedBits.make(same / 0, torch.full((4,), 3))


def test_a_damaged_file_is_refused() -> None:
    found = MixedBits.make(weight(4, 16), torch.tensor([2, 3, 4, 9]))
    spec, tensors = found.spec(), found.tensors()
    for key, value, error in (
        ("counts", [0, 1, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "codes: "),
        ("counts", [0, 1, 1, 1], "can't part"),
        ("least", 3, "the least is said"),
        ("shape", [4, 15], "codes: |can't part"),
    ):
        with pytest.raises(FileError, match=error):
            nybble.qtensor.from_spec({**spec, key: value}, tensors)
    other = MixedBits.make(weight(4, 16), torch.tensor([9, 3, 4, 2]))
    mixed = nybble.qtensor.from_spec(spec, {**tensors, "widths": other.widths})
    mixed.validate()  # the same widths in another order can't be told
    wrong = nybble.qtensor.from_spec(spec, {**tensors, "widths": torch.zeros_like(tensors["widths"])})
    with pytest.raises(FileError, match="groups by width"):
        wrong.validate()


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("options", "line", "error"),
    [
        ({"group": 7}, EIGHT, "groups of 7"),
        ({"least": 8}, EIGHT, "begins with the 8 bits"),
        ({"most": 8}, EIGHT, "begins with the 8 bits"),
        ({"least": 0}, EIGHT, "least is 1 or more"),
        ({"most": 16}, EIGHT, "most up to 15"),
        ({"penalty": -1.0}, EIGHT, "0 or more"),
        ({"noise": "normal"}, EIGHT, "gaussian or uniform"),
        ({}, Quantizer("uint8 group=8 scale=minmax(offset=true)"), "one range for the whole tensor"),
    ],
)
def test_refusals(options: dict[str, Any], line: Quantizer, error: str) -> None:
    with pytest.raises(SchemeError, match=error):
        learned(weight(), line, **options)


# --------------------------------------------------------------------------------------------------------- whole models
def test_train_convert_save_load(tmp_path: Path) -> None:
    """Eval mode computes what the file does, and training mode has its float weights back."""
    model: Any = prepare(tiny_model("llama", torch.float32), SCHEME, {"weights": PseudoNoise(penalty=200.0)})
    latents = {name: twin.weight.latent for name, twin in model.named_modules() if isinstance(twin, FakeLayer)}
    optimizer = torch.optim.Adam(learning_groups(model, {"bits": 0.2}), lr=2e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        task = model.train()(input_ids=input_ids(), labels=input_ids(), use_cache=False).loss
        (task + penalty_of(model, 0)).backward()
        optimizer.step()
        losses.append(float(task.detach()))
    assert losses[-1] < 0.8 * losses[0]
    before = {name: latent.clone() for name, latent in latents.items()}
    expected = logits(model.eval())
    assert all(torch.equal(latent, before[name]) for name, latent in latents.items())
    packs = {n: m.qtensor() for n, m in convert(model).named_modules() if isinstance(m, Packed)}
    assert len(packs) == len(latents) and all(isinstance(q, MixedBits) for q in packs.values())
    assert len({count for q in packs.values() for count in q.counts}) > 2  # type: ignore[attr-defined]
    assert torch.equal(logits(model), expected)
    nybble.save(model, tmp_path / "out")
    loaded, _ = nybble.load(tmp_path / "out")
    assert torch.equal(logits(loaded), expected)


def test_the_recipe(tmp_path: Path) -> None:
    """`nybble train diffq`: a larger penalty gives a smaller file; a rate for what isn't there is refused."""
    pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'nybble[train]'")
    folder, text = save_tiny(tmp_path / "model"), save_text(tmp_path / "text.txt")
    settings = TrainSettings(steps=6, batch=2, accumulate=1, seq_len=16, lr=0.1, dtype="float32", checkpointing=False)
    sizes = []
    for penalty in (0.0, 1e5):
        options = {"learned": {"weights": {"pseudo-noise": {"penalty": penalty}}}}
        out = tmp_path / f"out{penalty:g}"
        train("diffq", folder, out, str(text), options=options, settings=settings)
        made, _ = nybble.load(out)
        sizes.append(sum(m.qtensor().nbytes() for m in made.modules() if isinstance(m, Packed)))
    assert sizes[1] < 0.85 * sizes[0]
    with pytest.raises(UsageError, match="no layer learns 'bit'"):
        train("diffq", folder, tmp_path / "no", str(text), options={"rates": {"bit": 2.0}}, settings=settings)
