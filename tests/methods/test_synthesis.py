"""Images made of a classifier alone (arXiv:2112.02086): terms, windows, rounds, the folder; of six drawn patterns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.patterns import CLASSES, SIDE, WANTS, fresh, patterns, pixels, save_teacher, teacher
from tests.tiny import save_tiny
from torch import Tensor, nn
from torch.nn import functional

from nybble.cli import main
from nybble.core.errors import FileError, LearningError, ModelError, NybbleError, UsageError
from nybble.data.images import image_samples
from nybble.pipelines import synthesise as pipeline
from nybble.training.synthesis import terms
from nybble.training.synthesis.images import Maker, Region, middle
from nybble.training.synthesis.options import Synthesis, rate

QUICK: dict[str, Any] = {"batch": 48, "half_steps": 0, "full_steps": 100, "warmup": 10, "norms": 0.1}
SMALL: dict[str, Any] = {"count": 24, "batch": 6, "rounds": 2, "half_steps": 4, "full_steps": 4, "warmup": 2}


def maker(**options: Any) -> Maker:
    return Maker(teacher(), WANTS, CLASSES, Synthesis(**{**QUICK, **options}))


def test_the_distance_is_of_what_batch_norm_itself_sees() -> None:
    """PyTorch's own statistics of the batch, the biased variance made of its unbiased one, are at distance 0."""
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(3, momentum=1.0)
    norm(x)
    mean, var, n = norm.running_mean, norm.running_var, 5 * 4 * 4
    assert mean is not None and var is not None
    assert terms.distance(x, mean, var * (n - 1) / n) < 1e-6
    assert terms.distance(x, mean, var) == pytest.approx((var / n).norm().item(), rel=1e-3)
    assert terms.distance(x, mean + torch.tensor([3.0, 4.0, 0.0]), var * (n - 1) / n) == pytest.approx(5, rel=1e-5)
    still = torch.ones(2, 1, 3, 3, requires_grad=True)
    terms.distance(still, torch.ones(1), torch.zeros(1)).backward()  # type: ignore[no-untyped-call]
    assert still.grad is not None and not still.grad.any()  # a norm at 0


def test_every_batch_norm_counts_and_the_first_more() -> None:
    model, x = teacher(), pixels(patterns(12, 3)[0])
    seen: list[Tensor] = []
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach())) for norm in norms]
    model(x)
    parts = [
        (part.mean((0, 2, 3)) - norm.running_mean).norm()
        + (part.var((0, 2, 3), correction=0) - norm.running_var).norm()
        for part, norm in zip(seen, norms, strict=True)
    ]
    for hook in hooks:
        hook.remove()
    for first in (1.0, 10.0):
        with torch.no_grad(), terms.watched(model, first) as told:
            model(x)
            assert told.total() == pytest.approx(float(first * parts[0] + sum(parts[1:])), rel=1e-4)
    assert len(norms) == 7 and not any(m._forward_pre_hooks for m in norms)


def test_smooth_and_small() -> None:
    """0 on constants, gradients by finite differences, the same whatever is added; of a single step what it is."""
    x = torch.randn(2, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert [float(v) for v in terms.variation(torch.full((2, 3, 4, 4), 0.7))] == [0, 0] and terms.size(x * 0) == 0
    assert torch.autograd.gradcheck(terms.variation, (x,)) and torch.autograd.gradcheck(terms.size, (x,))
    for a, b in zip(terms.variation(x), terms.variation(x + 3), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    one = torch.zeros(1, 1, 3, 3)
    one[0, 0, 1, 1] = 2.0
    mean, norm = terms.variation(one)
    assert mean == pytest.approx(2 * (4 / 6) + 2 * (4 / 4)) and norm == pytest.approx(4 * 8**0.5)
    corner = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert terms.variation(corner)[0] == 0.5 + 0.5 + 1 + 0 and terms.variation(corner.flip(-1))[0] == 2


def test_soft_cross_entropy_is_torchs_and_above_the_entropy() -> None:
    drawn = torch.Generator().manual_seed(2)
    logits, wanted = torch.randn(9, 5, generator=drawn), torch.randn(9, 5, generator=drawn)
    chances = wanted.softmax(-1)
    assert torch.allclose(terms.soft_cross_entropy(logits, chances), functional.cross_entropy(logits, chances))
    entropy = torch.special.entr(chances).sum(-1).mean()
    assert terms.soft_cross_entropy(logits, chances) > entropy
    assert torch.allclose(terms.soft_cross_entropy(wanted, chances), entropy)


def test_the_rate_rises_and_falls_in_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Synthesis()
    found = [rate(step, 3000, options) for step in range(3000)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.25)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2900)
    for step in range(100, 3000):
        assert found[step] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()
    assert found[:100] == pytest.approx([0.25 * (i + 1) / 100 for i in range(100)]) and found[-1] < 1e-6
    rates: list[float] = []

    def noted(self: Maker, x: Tensor, adam: Any, region: Region) -> None:
        rates.append(adam.param_groups[0]["lr"])
        assert not adam.state or len(rates) != 7  # the second stage begins with a new Adam
        adam.step()

    monkeypatch.setattr(Maker, "update", noted)
    made = maker(half_steps=6, full_steps=8, warmup=2)
    made.make(0, 0, None)
    assert rates == [rate(i, n, made.options) for n in (6, 8) for i in range(n)]


@pytest.mark.parametrize("strict", [True, False])
def test_an_update_moves_its_window_alone(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient outside; what Adam's momentum would move there stays where it was; pixels are what bytes can be."""
    low, high, moved = -0.5 / 0.27, 0.5 / 0.27, []
    real = Maker.update

    def watched(self: Maker, x: Tensor, adam: Any, region: Region) -> None:
        inside = torch.zeros_like(x, dtype=torch.bool)
        inside[(..., *region.within(x))] = True
        assert x.grad is not None and not x.grad[~inside].any() and x.grad[inside].any()
        before = x.detach().clone()
        real(self, x, adam, region)
        outside = before.clamp(low, high)[~inside]
        moved.append(not torch.equal(x.detach()[~inside], outside))
        assert x.min() >= low - 1e-6 and x.max() <= high + 1e-6

    monkeypatch.setattr(Maker, "update", watched)
    maker(half_steps=8, full_steps=8, warmup=2, strict=strict, canvas=18, flip=False).make(0, 0, None)
    assert any(moved) != strict


def test_windows_at_both_resolutions() -> None:
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    region = Region(2, 1, 0, 2, 3, True)
    rows, columns = region.within(x)
    assert (rows, columns) == (slice(2, 6), slice(0, 6))
    assert torch.equal(region.of(x), functional.avg_pool2d(x[..., rows, columns], 2).flip(-1))
    assert torch.equal(middle(x, (4, 6)), x[..., 2:6, 1:7])
    made, drawn = maker(half_steps=4, warmup=2), torch.Generator().manual_seed(0)
    found = [made.region(scale, drawn) for scale in (1, 2) for _ in range(60)]
    assert (
        made.canvas == (14, 14) and {r.top for r in found[:60]} == {0, 1, 2} and {r.top for r in found[60:]} == {0, 1}
    )
    assert {r.flip for r in found} == {False, True}


def test_rounds_and_the_teacher_stays_as_it_is() -> None:
    """Classes are met, statistics come near; the next round is towards the answers, anew, and these are soft."""
    made = maker(full_steps=70)
    model = made.model.train()
    next(iter(model.parameters())).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = made.make(0, 0, None)
    second = made.make(0, 1, first.logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.bincount(first.labels).tolist() == [8] * CLASSES
    for each in (first, second):
        assert (each.logits.argmax(-1) == each.labels).double().mean() > 0.9
    with torch.no_grad(), terms.watched(model, 10.0) as told:
        x = pixels(middle(first.images.permute(0, 3, 1, 2), (SIDE, SIDE))[:, 0].numpy())
        assert torch.allclose(model(pixel_values=x).logits, first.logits, atol=1e-5)
        told.total()
        model(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        assert first.distance < 0.5 * told.total()
    assert torch.equal(made.targets(0, first.logits), first.logits.softmax(-1))
    assert torch.special.entr(first.logits.softmax(-1)).sum(-1).mean() > 0.01
    assert not torch.equal(first.images, second.images)
    again = made.make(0, 1, first.logits)
    assert torch.equal(again.images, second.images) and torch.equal(again.logits, second.logits)


def test_soft_targets_are_approached() -> None:
    """With nothing else in the loss it comes near the entropy of what is aimed at, and never below."""
    made = maker(norms=0.0, tv2=0.0, l2=0.0, canvas=SIDE)
    wanted = torch.randn(48, CLASSES, generator=torch.Generator().manual_seed(3))
    found = made.make(0, 1, wanted)
    entropy = float(torch.special.entr(wanted.softmax(-1)).sum(-1).mean())
    assert entropy <= found.loss < entropy + 0.05


def student(x: Tensor, chances: Tensor) -> float:
    """Accuracy on drawn patterns of a network that learned from other images."""
    torch.manual_seed(1)
    model = fresh().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        chosen = torch.randint(len(x), (36,))
        loss = functional.cross_entropy(model(x[chosen]).logits, chances[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    images, labels = patterns(240, 5)
    with torch.no_grad():
        model(x)
        return float((model.eval()(pixels(images)).logits.argmax(-1).numpy() == labels).mean())


def test_a_student_learns_from_them_and_not_from_noise() -> None:
    made = maker(batch=72, full_steps=70)
    found = made.make(0, 0, None)
    x = pixels(middle(found.images.permute(0, 3, 1, 2), (SIDE, SIDE))[:, 0].numpy())
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).clamp(-1.85, 1.85)
    with torch.no_grad():
        said = made.model(noise).logits
    learned, lost = student(x, found.logits.softmax(-1)), student(noise, said.softmax(-1))
    assert learned > lost + 0.2, (learned, lost)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "model")


def test_a_folder_that_data_takes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    monkeypatch.setattr(sys, "argv", ["nybble", "synthesise", str(folder), str(tmp_path / "out"), *words, "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out/synthesis.json").read_text()) and told["images"] == 24
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "images.npz", "synthesis.html", "synthesis.json",
    ]  # fmt: skip
    held = np.load(tmp_path / "out/images.npz")
    assert held["images"].shape == (24, SIDE, SIDE) and held["logits"].shape == (24, CLASSES)
    samples = image_samples(str(tmp_path / "out"), WANTS, samples=None)
    with torch.no_grad():
        said = teacher()(samples.pixel_values).logits
    assert np.allclose(said.numpy(), held["logits"], atol=1e-4) and samples.labels is not None
    assert samples.labels.tolist() == held["labels"].tolist()
    assert [row["round"] for row in told["rounds"]] == [0, 1]
    page = (tmp_path / "out/synthesis.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    with pytest.raises(SystemExit) as again:
        main()
    assert again.value.code == 1


def test_killed_and_gone_on_with(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    pipeline.synthesise(folder, whole, Synthesis(**SMALL))
    real, calls = Maker.make, []

    def killed(self: Maker, batch: int, number: int, *more: Any) -> Any:
        calls.append((batch, number))
        if calls[-1] == (1, 1) and calls.count((1, 1)) == 1:
            raise KeyboardInterrupt
        return real(self, batch, number, *more)

    monkeypatch.setattr(Maker, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.synthesise(folder, tmp_path / "out", Synthesis(**SMALL))
    with pytest.raises(FileError, match=r"begun with seed = 0; now it is 1"):
        pipeline.synthesise(folder, tmp_path / "out", Synthesis(**SMALL, seed=1), resume=True)
    pipeline.synthesise(folder, tmp_path / "out", Synthesis(**SMALL), resume=True)
    assert calls == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 1)]
    for name in ("images.npz", "synthesis.json", "synthesis.html"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes(), name


def test_what_is_kept(folder: Path, tmp_path: Path) -> None:
    made = {**SMALL, "count": 6, "store": "canvas"}
    pipeline.synthesise(folder, tmp_path / "all", Synthesis(**{**made, "count": 12}))
    pipeline.synthesise(folder, tmp_path / "last", Synthesis(**made, keep="last"))
    both, last = (np.load(tmp_path / name / "images.npz") for name in ("all", "last"))
    assert both["images"].shape == (12, 14, 14) and np.array_equal(both["images"][6:], last["images"])


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, kind: type[NybbleError], model: Path = folder, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            pipeline.synthesise(model, tmp_path / "out", Synthesis(**{**SMALL, **options}))
        assert not (tmp_path / "out").exists()

    fresh("instance").save_pretrained(tmp_path / "plain")
    refused("without BatchNorms, whose statistics", ModelError, tmp_path / "plain")
    refused("images are made of classifiers of images", ModelError, save_tiny(tmp_path / "llama"))
    refused("canvas is 10, and the model sees windows of 12", UsageError, canvas=10)
    refused("canvas is 13, and the model sees windows of 12; it is an even", UsageError, canvas=13)
    refused("warmup is 100, and a stage has 4 updates", UsageError, warmup=100)
    refused("count is 0", UsageError, count=0)
    refused("norms is -1", UsageError, norms=-1.0)
    broken = teacher()
    with torch.no_grad():
        broken.net[1].running_var.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    refused("the loss of update 4 is nan", LearningError, tmp_path / "broken")
    with pytest.raises(ModelError, match="names 7 classes, and its head gives 6"):
        Maker(teacher(), WANTS, 7, Synthesis(**QUICK)).make(0, 0, None)
    with pytest.raises(ModelError, match="has no BatchNorm that keeps statistics"):
        Maker(fresh("none"), WANTS, CLASSES, Synthesis(**QUICK)).make(0, 0, None)
