"""Pruning ternary quantization: its sheet's checks of codes, scales, gradients, stages and sizes; the whole recipe.

Liu et al. 2021, arXiv:2107.10998.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, logits, save_text, save_tiny, tiny_model
from torch import Tensor, nn

import nybble
from nybble.core.errors import SchemeError
from nybble.learned.pruned import Pruned, PrunedTernary
from nybble.nn.fake import FakeLayer
from nybble.nn.packed import Packed
from nybble.pipelines.train import train
from nybble.quantizer import Quantizer
from nybble.training.callbacks.pruning import PruningInSteps
from nybble.training.convert import convert
from nybble.training.prepare import learning_groups, prepare
from nybble.training.settings import TrainSettings

ROWS = Quantizer("ternary channel")


def learned(x: Tensor, line: Quantizer = ROWS, **options: Any) -> PrunedTernary:
    found = Pruned(**options).make(line, x)
    assert isinstance(found, PrunedTernary)
    return found


def weight(rows: int = 24, columns: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------- codes and scales
@pytest.mark.parametrize("share", [0.0, 0.3, 0.501, 0.8, 0.999])
def test_codes_are_signs_of_the_largest(share: float) -> None:
    x = weight()
    t = learned(x, share=share).directions(x)[1]
    assert set(t.flatten().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(t[t != 0], x.sign()[t != 0])
    assert int((t == 0).sum()) == math.ceil(share * x.numel())
    assert share == 0 or x.abs()[t == 0].max() < x.abs()[t != 0].min()


def test_equal_magnitudes_are_pruned_together() -> None:
    """The threshold itself is 0, zeros always are."""
    x = torch.tensor([[1.0, -1.0, 1.0, 2.0], [0.0, 3.0, -2.0, 1.0]])
    t = learned(x, share=0.25).directions(x)[1]
    assert t.tolist() == [[0, 0, 0, 1], [0, 1, -1, 0]]
    with pytest.raises(SchemeError, match=r"share=0\.7 leaves none of a layer's 8 weights"):
        learned(torch.ones(2, 4), share=0.7)


def test_projection_and_the_best_scale() -> None:
    x = weight()
    made = learned(x, share=0.5)
    v, t = made.directions(x)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(24))
    stored = made.settle(x)
    assert isinstance(stored.params.scale, Tensor)
    alpha = stored.params.scale.double()
    kept = t.abs().sum(1, keepdim=True).double()
    torch.testing.assert_close(alpha, (x * t).double().sum(1, keepdim=True) / kept, rtol=1e-6, atol=0)
    error = (x - stored.dequantize()).double().square().sum(1)
    torch.testing.assert_close(error, x.double().square().sum(1) - (x * t).double().sum(1) ** 2 / kept[:, 0])
    for moved in (0.99, 1.01):
        assert ((x - moved * alpha * t).square().sum(1) > error).all()


def test_the_best_share_of_a_gaussian() -> None:
    """Threshold 0.612 sigma: 54.1 % are kept, at 1.224 sigma; cosine 0.900."""
    x = weight(1, 200_000)
    cosines = {share: float(learned(x, share=share).cosine(x)) for share in (0.35, 0.4, 0.459, 0.5, 0.6)}
    assert max(cosines, key=cosines.__getitem__) == 0.459 and cosines[0.459] == pytest.approx(0.8999, abs=1e-3)
    made = learned(x, share=0.459)
    assert float(made.settle(x).dequantize().max()) == pytest.approx(1.224, abs=5e-3)
    assert float(x.abs()[made.directions(x)[1] == 0].max()) == pytest.approx(0.612, abs=5e-3)


def test_a_row_of_which_nothing_is_left() -> None:
    x = weight(4, 8)
    x[1] *= 1e-3
    x[2] = 0
    made = learned(x, share=0.5)
    for mode in (True, False):
        found = made.train(mode)(x.requires_grad_())
        assert found.isfinite().all() and not found[1:3].any() and found[0].any()
    made.train()(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ gradients
def test_the_gradient_has_no_part_along_the_weight() -> None:
    x, target = weight().requires_grad_(), weight(seed=1)
    made = learned(x, share=0.4, decay=0.0).train()
    (made(x) * target).sum().backward()
    assert x.grad is not None
    along = (x.detach() * x.grad).sum(1).abs()
    assert (along <= 1e-6 * x.detach().norm(dim=1) * x.grad.norm(dim=1)).all()

    def smooth(w: Tensor) -> Tensor:
        gain = made.gain.detach().double()
        found: Tensor = (gain * w / w.norm(dim=1, keepdim=True) * target.double()).sum()
        return found

    wide = x.detach().double()
    for at in range(0, x.numel(), 97):
        step = torch.zeros_like(wide)
        step.view(-1)[at] = 1e-6
        expected = (smooth(wide + step) - smooth(wide - step)) / 2e-6
        assert float(x.grad.reshape(-1)[at]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    expected = (made.directions(x)[0] * target).sum(1, keepdim=True)
    torch.testing.assert_close(made.gain.grad, expected)


def test_pruned_weights_decay() -> None:
    x = weight()
    grads = []
    for decay in (0.0, 0.25):
        leaf = x.clone().requires_grad_()
        learned(x, decay=decay).train()(leaf).square().sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    t = learned(x).directions(x)[1]
    torch.testing.assert_close(grads[1] - grads[0], torch.where(t == 0, 0.25 * x, 0.0), rtol=1e-4, atol=1e-5)


def test_while_it_is_pruned() -> None:
    """Training computes the weight without its smallest, and passes all of the gradient."""
    x, target = weight().requires_grad_(), weight(seed=1)
    made = learned(x, decay=0.0).train()
    made.ternary = False
    found = made(x)
    assert torch.equal(found, torch.where(made.directions(x)[1] != 0, x, 0.0))
    (found * target).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, target)
    assert torch.equal(made.eval()(x), learned(x).eval()(x))
    made.share, moved = 0.7, weight(seed=2)  # stored at any time: gains of what there is by then
    assert torch.equal(made(moved), learned(moved, share=0.7).eval()(moved))


# --------------------------------------------------------------------------------------------------------------- stages
def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)
    )


def problem(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """What another network says of random numbers."""
    x = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(42)
    teacher = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))
    with torch.no_grad():
        return x, (4 * teacher(x)).argmax(1)


def fit(
    model: nn.Module, steps: int, callback: PruningInSteps | None = None, lr: float = 3e-3
) -> list[dict[str, float]]:
    x, y = problem(0, 2000)
    acting = None if callback is None else callback.attach(model)
    optimizer = torch.optim.Adam(learning_groups(model, {}), lr=3e-3)
    seen = []
    for step in range(steps):
        progress = step / (steps - 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()  # type: ignore[no-untyped-call]
        if acting is not None:
            acting.before_update(progress)
        optimizer.step()
        if acting is not None:
            acting.after_update(progress)
            seen.append(acting.newest())
    return seen


def test_ternary_begins_with_gains_of_its_moment_and_a_state_remembers_where_it_was() -> None:
    made, other = (
        prepare(network(seed), {"weights": "ternary channel", "ignore": []}, {"weights": Pruned()}) for seed in (1, 2)
    )
    acting = PruningInSteps().attach(made)
    first: Any = made.get_submodule("0")
    with torch.no_grad():
        first.weight.latent.mul_(3)
    acting.after_update(0.5)
    part = first.weight.learned
    assert part.ternary and torch.equal(part.gain, part.least_squares(first.weight.latent))
    other.load_state_dict(made.state_dict())
    PruningInSteps().attach(other)  # a run that is gone on with: not back to the beginning
    again: Any = other.get_submodule("0")
    assert (again.weight.learned.share, again.weight.learned.ternary) == (0.6, True)


def loss(model: nn.Module) -> float:
    x, y = problem(7, 2000)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model.eval()(x), y))


@pytest.mark.parametrize("seed", [1, 2])
def test_stages(seed: int) -> None:
    """Weights come nearer to their signs; staged training ends below ternary from the start, and that below none."""
    float_model = network(seed)
    fit(float_model, 200)
    found: dict[str, float] = {}
    for kind in ("one shot", "at once", "staged"):
        model = copy.deepcopy(float_model)
        prepare(model, {"weights": "ternary channel", "ignore": []}, {"weights": Pruned(share=0.6)})
        if kind == "staged":
            twins = [m.weight for m in model.modules() if isinstance(m, FakeLayer)]
            cosines = [twin.learned.cosine(twin.latent) for twin in twins]  # type: ignore[union-attr,operator]
            seen = fit(model, 200, PruningInSteps(share=0.6, ternary=0.4, final=0.9))
            assert [round(s["pruned"], 2) for s in seen[10:80:16]] == [0.3, 0.38, 0.45, 0.53, 0.6]
            assert seen[78]["cosine"] > torch.cat(cosines).mean()
            assert max(s["pruned"] for s in seen) < 0.62
        elif kind == "at once":
            fit(model, 200)
        found[kind] = loss(model)
        assert loss(convert(model)) == pytest.approx(found[kind], abs=1e-6)
    assert loss(float_model) < found["staged"] < found["at once"] < found["one shot"]


def test_no_weight_moves_in_the_end() -> None:
    model = prepare(network(), {"weights": "ternary channel", "ignore": []}, {"weights": Pruned()})
    x, y = problem(0, 100)
    acting = PruningInSteps(ternary=0.0, final=0.5).attach(model)
    optimizer = torch.optim.AdamW(learning_groups(model, {}), lr=0.01, weight_decay=0.1)
    for progress in (0.0, 0.4, 0.6, 0.8):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        acting.before_update(progress)
        optimizer.step()
        acting.after_update(progress)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == ("latent" in name and progress >= 0.5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"first": 0.7}, "rising"), ({"share": 1.0}, "below 1"), ({"raises": 0}, "1 or more"),
        ({"ternary": 0.95}, "comes before"), ({"final": 1.5}, "from 0 to 1"),
    ],
)  # fmt: skip
def test_refusals_of_the_callback(options: dict[str, Any], error: str) -> None:
    with pytest.raises(SchemeError, match=error):
        PruningInSteps(**options)


@pytest.mark.parametrize(
    ("options", "line", "error"),
    [
        ({"share": 1.0}, "ternary channel", "below 1"), ({"share": -0.1}, "ternary channel", "0 or more"),
        ({"decay": -1.0}, "ternary channel", "0 or more"), ({}, "int4 channel", "other levels"),
        ({}, "ternary channel scale=mean(offset=true)", "an offset"),
    ],
)  # fmt: skip
def test_refusals_of_the_part(options: dict[str, Any], line: str, error: str) -> None:
    with pytest.raises(SchemeError, match=error):
        learned(weight(), Quantizer(line), **options)
    with pytest.raises(SchemeError, match="isn't finite"):
        learned(weight() / 0)


# --------------------------------------------------------------------------------------------------------- sizes, files
def test_sizes(tmp_path: Path) -> None:
    """2 bits or 8/5 of one a weight in the file; the entropy of the codes beside them in the report."""
    model = prepare(tiny_model("llama", torch.float32), {"weights": "ternary channel"}, {"weights": Pruned()})
    acting = PruningInSteps(share=0.7, ternary=0.0).attach(model)
    rows = acting.layers()
    assert all(row["pruned"] == math.ceil(0.7 * row["weights"]) for row in rows.values())
    for row in rows.values():
        rho = row["pruned"] / row["weights"]
        most = -rho * math.log2(rho) - (1 - rho) * math.log2((1 - rho) / 2)
        assert most - 0.02 < row["entropy"] <= most + 1e-9
    expected = logits(model.eval())
    nybble.save(convert(model), tmp_path / "out")  # type: ignore[arg-type]
    loaded, _ = nybble.load(tmp_path / "out")
    assert torch.equal(logits(loaded), expected)
    for at, packed in loaded.named_modules():
        if isinstance(packed, Packed):
            found = packed.qtensor().bytes_by_role()["codes"]
            assert found == -(-rows[at.removesuffix(".weight")]["weights"] // 4)
    x = weight(7, 9)
    base3 = Quantizer("ternary channel packing=base3")
    stored = learned(x, base3).settle(x)
    assert stored.bytes_by_role()["codes"] == 13
    assert torch.equal(stored.dequantize(), learned(x).settle(x).dequantize())


def test_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'nybble[train]'")
    folder, text = save_tiny(tmp_path / "model"), save_text(tmp_path / "text.txt")
    settings = TrainSettings(steps=6, batch=2, accumulate=1, seq_len=16, lr=0.01, dtype="float32", checkpointing=False)
    found = train("pruning-ternary", folder, tmp_path / "out", str(text), settings=settings)
    assert found["steps"] == 6
    made, _ = nybble.load(tmp_path / "out")
    packs = [m.qtensor() for m in made.modules() if isinstance(m, Packed)]
    zeros = [float((q.dequantize() == 0).float().mean()) for q in packs]
    assert packs and all(0.6 <= share < 0.61 for share in zeros)
    assert made(input_ids=input_ids()).logits.isfinite().all()
