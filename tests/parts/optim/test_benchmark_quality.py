"""benchmarks/optimizer_quality: what is held out, what the tasks ask, runs, the record, verdicts, the picture."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.optimizer_quality import __main__ as command
from benchmarks.optimizer_quality import pack, plot, sources, summary
from benchmarks.optimizer_quality.optimizers import CHOICES
from benchmarks.optimizer_quality.record import Record
from benchmarks.optimizer_quality.tasks import mlm, translate
from benchmarks.optimizer_quality.train import Trainer, factor, plan
from benchmarks.optimizer_quality.workers import pick


def write(path: Path, arrays: pack.Arrays, about: dict[str, Any]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, x in arrays.items():
            archive.writestr(f"{name}.npy.xz", pack.compressed(x))
        archive.writestr("about.json", json.dumps(about))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own reference, bytes as tokens."""
    ids = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode()[:60_000], np.uint8).astype("<u2")
    arrays = {"lm.train": ids[:50_000], "lm.held": ids[50_000:]}
    return write(tmp_path_factory.mktemp("data") / "text.zip", arrays, {"vocabulary": 256})


class Characters:
    """As much of a tokenizer as the packing asks for."""

    @property
    def backend_tokenizer(self) -> Characters:
        return self

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[Any]:
        return [type("Encoded", (), {"ids": [ord(c) % 500 + 1 for c in found]}) for found in texts]


# ------------------------------------------------------------------------------------------------------------- data
def test_descriptions_are_read_as_debian_writes_them() -> None:
    record = "Package: a\nDescription-en: short one\n first line\n goes on\n .\n second\n\nPackage: b\nSection: net\n"
    first, second = sources.stanzas(record)
    assert sources.prose(first["Description-en"]) == ("short one", "first line goes on\nsecond")
    assert second == {"Package": "b", "Section": "net"}
    assert sources.plain("~Save  as (~S)") == "Save as"


def test_what_belongs_together_is_held_out_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = [
        sources.Described(
            name=f"p{i}-{part}", source=f"p{i}", section="rare" if i == 9 else "net", summary="s", description="d"
        )
        for i in range(200)
        for part in ("bin", "d")
    ]
    monkeypatch.setattr(sources, "descriptions", lambda raw: made)
    arrays, about = pack.packages(tmp_path, Characters())
    held, one = arrays["packages.held"].reshape(-1, 2), arrays["packages.one"].reshape(-1, 2)
    assert about["sections"] == ["net"] and len(held) == 199
    assert (held[:, 0] == held[:, 1]).all() and 5 < held[:, 0].sum() < 25
    assert (one == [False, True]).all()  # the shorter name


def test_a_target_is_the_given_text_one_word_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pairs = [(f"word {i}", "x" * (1 + i % pack.SENTENCE)) for i in range(160)] + [("too long", "x" * 41)]
    monkeypatch.setattr(sources, "translations", lambda raw: {"de": pairs, "ro": pairs})
    monkeypatch.setattr("benchmarks.ladder.text.train_tokenizer", lambda texts, words: Characters())
    arrays, about = pack.translations(tmp_path)
    held = arrays["pairs.held"]
    assert len(held) == 320 and (held[:160] == held[160:]).all()
    task = translate.Strings(write(tmp_path / "pairs.zip", arrays, about), plan("translate", {}, True))
    for source, given, asked in zip(*task.train, strict=True):
        length = int((asked != translate.IGNORED).sum()) - 1
        assert (given[1 : length + 1] == asked[:length]).all() and asked[length] == translate.END
        assert given[0] > translate.END and source[0] == ord("w") % 500 + 1
    assert {int(x) for x in task.train[1][:, 0]} == {translate.END + 1, translate.END + 4}


def test_packed_arrays_come_back(tmp_path: Path) -> None:
    rows = [[3, 1], [5], [2, 7, 9]]
    arrays = pack.ragged("a", rows, 2) | {"b": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    found, about = pack.read(write(tmp_path / "x.zip", arrays, {"k": 1}), "a.", "b")
    assert about == {"k": 1} and (found["b"] == arrays["b"]).all()
    assert pack.padded(found, "a", 3).tolist() == [[3, 1, 0], [5, 0, 0], [2, 7, 0]]
    (tmp_path / "y.zip").write_bytes(b"no zip")
    with pytest.raises(SystemExit, match=r"y\.zip is no file of --pack"):
        pack.read(tmp_path / "y.zip", "a")


# ------------------------------------------------------------------------------------------------------------- runs
def test_masks_leave_all_but_what_is_asked(text: Path) -> None:
    task = mlm.MaskedLM(text, plan("mlm", {}, True))
    ids = task.rows[:500]
    shown, places, target = task.masked(ids, torch.Generator().manual_seed(0))
    assert places.shape == (500, round(0.15 * 32)) and (ids.long().gather(1, places) == target).all()
    chosen = torch.zeros_like(shown, dtype=torch.bool).scatter(1, places, True)
    assert (shown == ids)[~chosen].all() and chosen.sum() == places.numel()
    assert (shown[chosen] == 256).float().mean() == pytest.approx(0.8, abs=0.04)  # 4.5 standard deviations


def test_runs_differ_by_their_optimizer_alone(text: Path) -> None:
    """A network that is used again begins anew; the 32-bit twins agree bit for bit on a CPU."""
    trainer = Trainer(text, "cpu", "eager", {"steps": 20}, tiny=True)
    names = ("AdamW", "AdamW8bit", "AdamW8bit-residual8", "AdamW-32", "AdamW")
    torch_, eight, residual, ours, again = (trainer.run("lm", name, 3) for name in names)
    assert torch_["held_out"] == ours["held_out"] == again["held_out"] and torch_["curve"] == ours["curve"]
    assert torch_["curve"][-1] < torch_["curve"][0] - 0.3
    assert eight["curve"][0] == torch_["curve"][0] and eight["held_out"] != torch_["held_out"]
    assert eight["held_out"]["loss"] == pytest.approx(torch_["held_out"]["loss"], rel=5e-3)
    assert residual["held_out"]["loss"] == pytest.approx(torch_["held_out"]["loss"], rel=2e-2)
    sizes = [found["state_bytes"] / found["parameters"] for found in (torch_, eight, residual)]
    wide = (256 * 64 + 32 * 64) / eight["parameters"]  # embeddings, and positions, which are few
    assert sizes[0] == 8 and sizes[1] == pytest.approx(8 * wide + (2 + 8 / 256) * (1 - wide), abs=0.05)
    assert sizes[2] == pytest.approx(sizes[1] + 1, abs=0.01)
    assert trainer.run("lm", "AdamW", 4)["curve"] != torch_["curve"]


@pytest.mark.parametrize("name", CHOICES)
def test_every_parameter_is_in_one_optimizer(name: str) -> None:
    from benchmarks.optimizer_quality.models import LanguageModel

    choice = CHOICES[name]
    if choice.needs != "nybble" and choice.needs != "torch":
        pytest.importorskip(choice.needs)
    model = LanguageModel(64, 64, 2, 1, 16, causal=True)
    groups = [group for made in choice.build(model, plan("lm", {}, True)) for group in made.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    assert all((group["weight_decay"] > 0) == (p.ndim > 1) for group in groups for p in group["params"])
    if choice.needs == "nybble":  # of embeddings alone, unless all are asked for
        wide = [p.shape for group in groups if group["state"] == dict.fromkeys(group["state"]) for p in group["params"]]
        assert choice.bits == 32 or wide == ([] if name.endswith("-all") else [(64, 64)])


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [factor(step, 100) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rates[9] == 1 and rates[99] == pytest.approx(1 / 91) and sorted(rates[9:], reverse=True) == rates[9:]


def test_the_command_goes_on_where_it_stopped(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    given = ["x", "--data", str(text), "--device", "cpu", "--tiny", "--tasks", "lm", "--record", str(record)]

    def run(*more: str) -> str:
        monkeypatch.setattr("sys.argv", [*given, *more])
        command.main()
        return capfd.readouterr().out

    assert "not begun: lm Lion 0, lm Lion8bit 0" in run("--optimizers", "Lion8bit", "--seconds", "0")
    assert not record.exists()
    assert "lm Lion 0: loss" in run("--optimizers", "Lion")
    before = json.loads(record.read_text())["runs"]
    assert "lm Lion 0: loss" not in run("--optimizers", "Lion8bit", "--missing")  # its twin is there
    after = json.loads(record.read_text())["runs"]
    assert [found["optimizer"] for found in after] == ["Lion", "Lion8bit"] and after[:1] == before
    assert "0 runs" in run("--optimizers", "Lion8bit", "--missing", "--dry")
    assert "1 runs" in run("--optimizers", "Lion", "--missing", "--dry", "--steps", "5")


def test_a_worker_keeps_its_task(tmp_path: Path) -> None:
    waiting = [(0, task, name) for task in ("lm", "mlm") for name in ("AdamW", "AdamW8bit")] + [(1, "mlm", "Lion")]
    record = Record(tmp_path / "none.json")
    assert pick(waiting, None, [], record) == (0, "lm", "AdamW")  # the longest
    assert pick(waiting, "mlm", [], record) == (0, "mlm", "AdamW")
    assert pick(waiting, None, [(0, "lm", "Lion")] * 9, record) == (0, "mlm", "AdamW")
    assert pick(waiting[:2] + waiting[4:], "mlm", [], record)[0] == 0  # seeds come one after another


# ---------------------------------------------------------------------------------------------------------- verdicts
def made(name: str, seed: int, loss: float, gpu: str = "G") -> dict[str, Any]:
    curve = [loss + 1, loss + 0.5, loss]
    return {
        "task": "lm", "optimizer": name, "seed": seed, "held_out": {"loss": loss}, "steps": 3, "curve": curve,
        "state_bytes": 20, "parameters": 10, "hardware": {"gpu": gpu, "cpu": "C"},
    }  # fmt: skip


def test_verdicts() -> None:
    runs = [made("AdamW", seed, 2.0) for seed in (0, 1)]
    runs += [made("AdamW8bit", 0, 2.009), made("AdamW8bit", 1, 2.011)]  # 0.5 % +- 0.05
    runs += [made("AdamWFp8", 0, 2.002), made("AdamWFp8", 1, 2.022)]  # 0.6 % +- 0.5
    runs += [made("AdamW4bit", 0, 2.024), made("AdamW4bit", 1, 2.026)]  # 1.25 % +- 0.05
    runs += [made("Factor4bit", 0, float("nan")), made("Lion8bit", 0, 3.0), made("AdamW-32", 0, 1.0, "H")]
    found = {name: cell for (_, name), cell in summary.cells(runs).items()}
    assert found["AdamW8bit"].apart == pytest.approx(0.5) and found["AdamW8bit"].error == pytest.approx(0.05)
    verdicts = {name: cell.verdict for name, cell in found.items()}
    assert verdicts["AdamWFp8"] == "unclear" and verdicts["AdamW4bit"] == verdicts["Factor4bit"] == "over"
    assert verdicts["Lion8bit"] == verdicts["AdamW-32"] == ""  # no twin; another machine's
    assert summary.spread(runs, "lm") == 0 and found["AdamW8bit"].seeds == 2
    said = summary.sentence([run for run in runs if run["optimizer"] != "AdamW8bit"])
    assert said.startswith("0 of 3") and "`AdamW4bit` on lm, `Factor4bit` on lm" in said
    head, rows = summary.rows(runs)
    (row,) = [row for row in rows if row[0].startswith("`AdamW4bit`")]
    assert len(head) == len(row) and row[1:] == ["2.00", "1", "**+1.25 ± 0.05 %**"]


def test_the_picture(tmp_path: Path) -> None:
    places = plot.spread_out([0.0, 0.01, 0.0, 0.9], -1, 1, 0.1)
    assert sorted(range(4), key=lambda i: places[i]) in ([0, 2, 1, 3], [2, 0, 1, 3])
    assert np.diff(sorted(places)).min() >= 0.099 and places[3] == pytest.approx(0.9)
    runs = [made(name, seed, 2 + 0.01 * i) for i, name in enumerate(("AdamW", "AdamW8bit")) for seed in (0, 1)]
    for name in ("a.png", "b.png"):
        plot.draw(runs, tmp_path / name)
    first = (tmp_path / "a.png").read_bytes()
    assert first[:4] == b"\x89PNG" and (tmp_path / "b.png").read_bytes() == first
    runs[2]["curve"] = [5.0, 5.0, None]
    plot.draw(runs, tmp_path / "b.png")
    assert hashlib.sha256((tmp_path / "b.png").read_bytes()).digest() != hashlib.sha256(first).digest()
    assert io.BytesIO(first).read(8)[1:4] == b"PNG"
