"""ACS (Huang et al. 2023, arXiv:2306.07215): scores, schedule, choice, and a run over any recipe of method qat."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.e2e.test_train import _Stops, files
from tests.parts.data.test_images import WANTS
from tests.parts.training.test_images_task import RESNET, model
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import DataError, LearningError, ModelError, NybbleError, SchemeError, UsageError
from nybble.core.options import build
from nybble.data.labelled_images import Rows
from nybble.pipelines.train import train
from nybble.training import coreset
from nybble.training.coreset import Coreset, CoresetOptions, chosen_of
from nybble.training.objective import Objective, make_losses
from nybble.training.recipe import load_training_recipe
from nybble.training.scores import SCORES, Seen
from nybble.training.settings import TrainSettings
from nybble.training.tasks import TASKS

loop = pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")
NAMES = ("dark", "grey", "bright")
SETTINGS = TrainSettings(epochs=5, batch=2, accumulate=1, lr=1e-2, save_every=2, dtype="float32", clip=1.0)


def seen(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Seen:
    return Seen(student=student, teacher=teacher, labels=labels, drawn=torch.Generator().manual_seed(0))


def examples(count: int = 18, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images whose brightness tells the class, nearly."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 100, (count, 16, 16)) + 60 * labels[:, None, None] + rng.integers(-25, 25, (count, 1, 1))
    return images.clip(0, 255).astype(np.uint8), labels


def made(tmp_path: Path, options: CoresetOptions, *, epochs: int = 10, flipped: int = 0, **more: Any) -> Coreset:
    """Of a network in training and its float teacher."""
    images, labels = examples()
    labels[:flipped] = (labels[:flipped] + 1) % 3
    rows, student = Rows(images, labels.tolist(), WANTS), model("ResNetForImageClassification", "resnet", RESNET)
    teacher = model("ResNetForImageClassification", "resnet", RESNET)
    given: dict[str, Any] = {"model": student, "teacher": teacher, "epochs": epochs, "seed": 0, "folder": tmp_path}
    return Coreset(options, TASKS.get("images"), rows, **{**given, **more})


def test_scores_are_norms_of_gradients() -> None:
    """Of cross-entropy with the label, and with a teacher at temperature 1, in the logits."""
    drawn = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(12, 7, dtype=torch.float64, generator=drawn)).requires_grad_()
    labels, wanted = torch.randint(7, (12,), generator=drawn), torch.randn(12, 7, dtype=torch.float64, generator=drawn)
    wanted = wanted.softmax(-1)
    for name, loss in (
        ("error-vector", functional.cross_entropy(logits, labels, reduction="sum")),
        ("disagreement", functional.cross_entropy(logits, wanted, reduction="sum")),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        found = SCORES.get(name)(seen(logits.detach().softmax(-1), wanted, labels))
        assert torch.allclose(found, gradient.square().sum(-1).sqrt(), atol=1e-6, rtol=0)
    sure = functional.one_hot(labels, 7).double()
    assert SCORES.get("error-vector")(seen(sure, None, labels)).abs().max() == 0
    assert SCORES.get("error-vector")(seen(sure.roll(1, -1), None, labels)).tolist() == pytest.approx([2**0.5] * 12)


def test_schedules() -> None:
    values = {"cosine": [1, 0.70711, 0], "half-cosine": [1, 0.5, 0], "linear": [1, 0.5, 0]}
    for name, expected in values.items():
        options = build(CoresetOptions, {"schedule": name}, "coreset")
        assert [options.weight(past) for past in (0, 0.5, 1)] == pytest.approx(expected, abs=1e-5)
        many = [options.weight(past / 50) for past in range(51)]
        assert many == sorted(many, reverse=True)
    assert build(CoresetOptions, {"last": None}, "coreset").weight(0.7) == 1


def test_the_ranking_goes_from_one_score_to_the_other(tmp_path: Path) -> None:
    it = made(tmp_path, CoresetOptions(fraction=0.5), teacher=model("ResNetForImageClassification", "resnet", RESNET))
    with torch.no_grad():
        it.model.classifier[1].bias += torch.tensor([0.5, 0.0, -0.5])  # type: ignore[index, union-attr]
    student, teacher = (it._probabilities(each) for each in (it.model, it.teacher))
    whole = seen(student, teacher, torch.tensor(it.labels))
    error, apart = (SCORES.get(name)(whole) for name in ("error-vector", "disagreement"))
    assert torch.equal(it.scores(0), error) and torch.allclose(it.scores(10), apart, atol=1e-7)
    assert torch.allclose(it.scores(5), 0.5**0.5 * error + (1 - 0.5**0.5) * apart)
    assert it.scores(5).argsort().tolist() != error.argsort().tolist()


def test_of_equal_networks_nothing_disagrees_and_wrong_labels_are_seen(tmp_path: Path) -> None:
    only = CoresetOptions(fraction=0.5, first="disagreement", last=None)
    assert made(tmp_path, only).scores(0).abs().max() == 0
    plain, flipped = (made(tmp_path, replace(only, first="error-vector"), flipped=n) for n in (0, 6))
    for it in (plain, flipped):  # a network that knows the classes
        it.model = _Knows(torch.tensor(plain.labels))
    assert made(tmp_path, only, flipped=6).scores(0).abs().max() == 0
    before, after = plain.scores(0), flipped.scores(0)
    assert (after[:6] > 2 * before[:6]).all() and torch.equal(after[6:], before[6:])
    assert set(after.argsort(descending=True)[:6].tolist()) == set(range(6))


def test_a_teacher_in_another_dtype_gets_images_in_its_own(tmp_path: Path) -> None:
    """As it is in a mixed run, of which the student's weights are float32."""
    it, same = (made(tmp_path, CoresetOptions(fraction=0.5)) for _ in range(2))
    assert it.teacher is not None and same.teacher is not None
    it.teacher.to(torch.bfloat16)
    found, exact = it.scores(5), same.scores(5)
    assert not torch.equal(found, exact) and torch.allclose(found, exact, atol=0.02)
    objective = Objective(it.task, make_losses({"logits": 1.0}), it.teacher.eval())
    batch = it.task.collate(it.rows[:6])
    wanted = it.teacher(batch["pixel_values"].to(torch.bfloat16)).logits
    loss = objective(it.model, batch, 0.0)
    assert loss.item() == pytest.approx(
        functional.kl_div(
            it.model(batch["pixel_values"]).logits.log_softmax(-1), wanted.float().log_softmax(-1), log_target=True,
            reduction="batchmean",
        ).item(), rel=1e-4, abs=1e-6,
    )  # fmt: skip


class _Knows(torch.nn.Module):
    """Tells most examples' own classes, in the order in which they come."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.labels, self.at = labels, 0
        self.any = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: Tensor) -> Any:
        part = self.labels[self.at : self.at + len(pixel_values)]
        self.at += len(pixel_values)
        return type("Output", (), {"logits": 2 * functional.one_hot(part, 3).float()})


@pytest.mark.parametrize("balanced", [True, False])
def test_what_is_kept(balanced: bool) -> None:
    labels = [0] * 10 + [1] * 7 + [2] * 3
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0))
    options = CoresetOptions(fraction=0.4, balanced=balanced)
    kept = chosen_of(scores, labels, options)
    assert kept == sorted(set(kept)) == chosen_of(scores, labels, options)
    if balanced:
        assert [sum(labels[i] == c for i in kept) for c in range(3)] == [4, 3, 1]
        for c in range(3):
            of = [i for i in range(20) if labels[i] == c]
            assert min(scores[i] for i in of if i in kept) >= max(scores[i] for i in of if i not in kept)
    else:
        assert kept == sorted(scores.topk(8).indices.tolist())
    assert chosen_of(scores, labels, replace(options, fraction=1.0)) == list(range(20))
    assert chosen_of(torch.zeros(20), labels, options)[:3] == [0, 1, 2]  # of equal ones the first


def test_scoring_changes_nothing_but_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, averages of BatchNorm and modes; nor does the number that is scored at a time change the choice."""
    it = made(tmp_path, CoresetOptions(fraction=0.5, every=3))
    it.model.train()
    it.model.resnet.embedder.eval()  # type: ignore[union-attr]
    before = {name: t.clone() for name, t in it.model.state_dict().items()}
    modes, state = [m.training for m in it.model.modules()], torch.get_rng_state()
    first = it.of_epoch(0)
    assert all(torch.equal(t, before[name]) for name, t in it.model.state_dict().items())
    assert [m.training for m in it.model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert json.loads((tmp_path / "coreset-0.json").read_text()) == first and len(first) == it.size == 9
    monkeypatch.setattr(coreset, "PART", 5)
    assert made(tmp_path / "again", CoresetOptions(fraction=0.5, every=3)).of_epoch(2) == first
    random = made(tmp_path / "random", CoresetOptions(fraction=0.5, every=1, first="random", last=None), teacher=None)
    assert len({tuple(random.of_epoch(epoch)) for epoch in range(3)}) == 3


def saved(tmp_path: Path) -> dict[str, Any]:
    images, labels = examples()
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    network = model("ResNetForImageClassification", "resnet", {**RESNET, "id2label": dict(enumerate(NAMES))})
    network.save_pretrained(tmp_path / "model")
    wants = {"size": {"height": 16, "width": 16}, "image_mean": [0.5], "image_std": [0.5]}
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(wants))
    return {"model": tmp_path / "model", "data": str(tmp_path / "data.npz")}


def run(out: Path, given: dict[str, Any], options: dict[str, Any], **more: Any) -> dict[str, Any]:
    every = {"learned": {"weights": "lsq"}, "coreset": {"fraction": 0.34, "every": 2}, **options}
    return train("qat", out=out, weights="int4 channel", options=every, **{"settings": SETTINGS, **given, **more})


def test_chosen_again_every_few_epochs_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third epoch: the same examples, and the same bytes; no loss asks for the teacher, the scores do."""
    given, scored, trained_on = saved(tmp_path), list[int](), list[list[int]]()
    scores, of_epoch = Coreset.scores, Coreset.of_epoch

    def scores_of(it: Coreset, epoch: int) -> Tensor:
        scored.append(epoch)
        return scores(it, epoch)

    def kept_of(it: Coreset, epoch: int) -> list[int]:
        trained_on.append(of_epoch(it, epoch))
        return trained_on[-1]

    monkeypatch.setattr(Coreset, "scores", scores_of)
    monkeypatch.setattr(Coreset, "of_epoch", kept_of)
    said: list[str] = []
    first = run(tmp_path / "whole", given, {}, announce=said.append)
    assert any("train on 34 % of 18 examples" in line for line in said)
    assert scored == [0, 2, 4] and first["steps"] == 15 and first["teacher"] == str(given["model"])
    assert trained_on[0] == trained_on[1] and trained_on[2] == trained_on[3] and len(trained_on) == 5
    assert len({tuple(kept) for kept in trained_on}) > 1 and {len(kept) for kept in trained_on} == {6}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", given, {}, progress=_Stops(8))
    run(tmp_path / "out", given, {}, settings=replace(SETTINGS, resume=True))
    assert files(tmp_path / "out", tmp_path / "whole") == files(tmp_path / "whole", tmp_path / "whole")
    assert scored == [0, 2, 4, 0, 2, 4]  # the third epoch's are read


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"fraction": 0.0}, UsageError, "coreset: fraction is 0.0; it is above 0"),
        ({"fraction": 1.1}, UsageError, "coreset: fraction is 1.1"),
        ({"every": 0}, UsageError, "coreset: every is 0"),
        ({"first": "error"}, UsageError, r"score of examples 'error'"),
        ({"schedule": "sine"}, SchemeError, "schedule is cosine or half-cosine or linear; got 'sine'"),
        ({"share": 0.1}, SchemeError, "no option 'share'"),
        ({"fraction": 0.05}, DataError, r"keeps none of the 6 examples of class 0; give 0.167 or more"),
        ({"fraction": 0.02, "balanced": False}, DataError, r"keeps none of the 18 examples; give 0.056 or more"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], kind: type[NybbleError], message: str) -> None:
    with pytest.raises(kind, match=message):
        run(tmp_path / "out", saved(tmp_path), {"coreset": options})
    assert not [*tmp_path.glob("out*")]


def test_what_scores_can_not_be_made_of(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a class each, and causal language models"):
        TASKS.get("language").classes_of([])
    other = model("ResNetForImageClassification", "resnet", {**RESNET, "id2label": {0: "a", 1: "b"}})
    with pytest.raises(ModelError, match="tells 3 classes and its teacher 2"):
        made(tmp_path, CoresetOptions(fraction=0.5), teacher=other).scores(0)
    it = made(tmp_path, CoresetOptions(fraction=0.5))
    with torch.no_grad():
        it.model.classifier[1].bias.fill_(float("nan"))  # type: ignore[index, union-attr]
    with pytest.raises(LearningError, match="gives NaN behind epoch 4"):
        it.scores(4)


def test_the_recipe(tmp_path: Path) -> None:
    """Weights and inputs in 4 bits with learned steps, on a third of the examples, taught by logits alone."""
    recipe, given = load_training_recipe("acs"), saved(tmp_path)
    found = train(
        recipe, out=tmp_path / "out", judged_on=given["data"], options={"coreset": {"fraction": 0.34, "every": 1}},
        settings={"epochs": 2, "batch": 6, "dtype": "float32"}, **given,
    )  # fmt: skip
    assert found["steps"] == 2 and found["options"]["coreset"]["first"] == "error-vector"
    assert found["evaluation"]["models"].keys() == {"float", "before", "after"}
