"""``nybble train`` with callbacks: what they did in every stage is on the page, and a killed run counts on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_train import _Stops
from tests.e2e.test_train_tasks import saved
from tests.parts.training.test_text_tasks import BERT, model, sentences

from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.pipelines.report import write_report
from nybble.pipelines.train import train
from nybble.training.settings import TrainSettings

pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'nybble[train]'")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
SETTINGS = TrainSettings(
    steps=4, batch=4, accumulate=1, seq_len=16, lr=2e-2, save_every=2, dtype="float32", checkpointing=False
)
OPTIONS: dict[str, Any] = {
    "learned": {"weights": "lsq"}, "stages": [{"scheme": {"weights": "int4 channel"}}],
    "callbacks": {"oscillation": {"reset_every": 3, "reset_at": 1}, "annealing": {"start": 0.5, "range": 0.1}},
}  # fmt: skip


def run(given: dict[str, Any], out: Path, settings: TrainSettings = SETTINGS, **more: Any) -> dict[str, Any]:
    given = {"scheme": {"weights": "int2 channel scale=learned"}, "options": OPTIONS, **given, **more}
    return train("qat", out=out, settings=settings, form="native", **given)


def test_in_stages_behind_a_kill(tmp_path: Path) -> None:
    rows = [{"text": text, "label": ("sport", "weather")[i % 2]} for i, text in enumerate(sentences(8))]
    given = saved(tmp_path, model("BertForSequenceClassification", "bert", {**BERT, "num_hidden_layers": 1}), rows)
    del given["judged_on"]
    whole = run(given, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(given, tmp_path / "out", progress=_Stops(7))
    again = run(given, tmp_path / "out", replace(SETTINGS, resume=True))
    assert {**again, "out": "", "seconds": 0} == {**whole, "out": "", "seconds": 0}
    for file in ("model.safetensors", "report.html", "training.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    oscillation, annealing = (whole["callbacks"][name] for name in ("oscillation", "annealing"))
    flips = oscillation["updates"]["flips"]
    assert len(flips) == len(whole["curve"]) == 8 and sum(flips[:4]) > 0
    assert sum(row["flips"] for row in oscillation["layers"].values()) == sum(flips[4:]) > 0
    assert sum(row["resets"] for row in oscillation["layers"].values()) > 0
    assert [share > 0.5 for share in annealing["updates"]["frozen"]] == 2 * [False, False, True, True]
    page = (tmp_path / "out/report.html").read_text()
    assert "Callback oscillation" in page and f'<td class="n">{int(sum(flips[4:])):,}</td>' in page
    record = json.loads((tmp_path / "out/training.json").read_text())
    (tmp_path / "alone").mkdir()
    for broken, says in (({"updates": {"flips": [1]}, "layers": {}}, "of the curve's updates"), ({}, "callbacks = ")):
        (tmp_path / "alone/training.json").write_text(json.dumps({**record, "callbacks": {"oscillation": broken}}))
        with pytest.raises(FileError, match=says):
            write_report(tmp_path / "alone")


def test_bad_callbacks_leave_nothing(tmp_path: Path) -> None:
    rows = [{"text": text, "label": "sport"} for text in sentences(4)]
    given = saved(tmp_path, model("BertForSequenceClassification", "bert", {**BERT, "num_hidden_layers": 1}), rows)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"callbacks": {"oscilation": {}}}, UsageError, "Did you mean 'oscillation'"),
        ({"callbacks": {"annealing": {"range": -1}}}, SchemeError, "annealing: range=-1"),
        ({"callbacks": {"annealing": {}}, "learned": {"weights": "flexround"}}, SchemeError, "rounded to the nearest"),
    ]  # fmt: skip
    for options, error, says in bad:
        with pytest.raises(error, match=says):
            run(given, tmp_path / "out", options=options)
        assert not [*tmp_path.glob("out*")]
