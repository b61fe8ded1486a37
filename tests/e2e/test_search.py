"""``nybble search``: the scheme is taken unchanged, the budget is kept to the byte, a killed run ends the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.tiny import save_text, save_tiny

import nybble
from nybble.checkpoint.account import inspect
from nybble.cli import main
from nybble.core.errors import FileError, ModelError, SchemeError, UsageError
from nybble.costs import latency
from nybble.pipelines.quantize import quantize
from nybble.pipelines.search import search
from nybble.pipelines.search_job import SearchSettings
from nybble.scheme import parse_scheme
from nybble.search.predictions import Predictions

SMALL = SearchSettings(samples=2, seq_len=24, random=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    save_tiny(folder / "model", hidden_size=32, intermediate_size=80)
    save_tiny(folder / "experts", "mixtral")
    save_text(folder / "text.txt")
    return folder


def run(place: Path, out: Path, model: str = "model", **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"budget": "bits=3.5", "data": str(place / "text.txt"), "settings": SMALL, **changes}
    return search(place / model, out, **asked)


@pytest.mark.parametrize(("model", "budget"), [("model", "bytes=17000"), ("experts", "bits=3.3")])
def test_the_scheme_is_taken_unchanged_and_costs_what_was_said(
    place: Path, tmp_path: Path, model: str, budget: str
) -> None:
    result = run(place, tmp_path / "found", model, budget=budget, menu="int2,int3,int4,int8 channel")
    assert result["total"] <= result["limit"]
    scheme = parse_scheme(yaml.safe_load((tmp_path / "found" / "scheme.yaml").read_text()))
    quantize(place / model, "rtn", out=tmp_path / "q", scheme=scheme, form="native")
    held: dict[str, int] = dict.fromkeys((row["name"] for row in result["layers"]), 0)
    for name, found in inspect(tmp_path / "q")["modules"].items():  # an expert each, or the layer's weight
        held[next(layer for layer in held if name.startswith(f"{layer}."))] += sum(found["bytes"].values())
    assert held == {row["name"]: row["bytes"] for row in result["layers"]}
    if budget.startswith("bytes"):
        assert sum(row["bytes"] for row in result["layers"]) == result["total"]
    of = {row["name"]: row["chosen"] for row in result["layers"]}
    assert all(len({of[name] for name in group}) == 1 for group in result["groups"])
    assert len(set(of.values())) > 1


def test_killed_and_resumed_ends_with_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the same; killed in the middle of measuring, and again while comparing, the same too."""
    run(place, tmp_path / "a", method="kl")
    asked: dict[str, Any] = {"budget": "bits=3.5", "data": str(place / "text.txt"), "method": "kl"}
    asked |= {"settings": {"samples": 2, "seq_len": 24, "random": 2}}  # a mapping is as good as SearchSettings
    nybble.search(place / "model", tmp_path / "b", **asked)
    whole, calls = Predictions.divergence, 0

    def killed(self: Predictions) -> float:
        nonlocal calls
        calls += 1
        if calls in (10, 60):
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(Predictions, "divergence", killed)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "c", method="kl")
    again = SearchSettings(samples=2, seq_len=24, random=2, resume=True)
    with pytest.raises(FileError, match=r"begun with budget.bits = 3.5; now it is 3.0"):
        run(place, tmp_path / "c", method="kl", settings=again, budget="bits=3")
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "c", method="kl", settings=again)
    with (tmp_path / "c.partial" / "measured.jsonl").open("a") as file:
        file.write('["kl model.la')  # a line that the kill cut
    run(place, tmp_path / "c", method="kl", settings=again)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"]
    assert files[0] == files[1] == files[2]
    assert set(files[0]) == {"scheme.yaml", "search.json", "search.html"}


def test_latency_is_kept_by_a_search_that_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another clock, and the same numbers; a time that nothing meets is refused, and nothing is left of it."""
    pace = 1e-6

    def clock(layer: Any, x: torch.Tensor, calls: int) -> float:
        assert x.shape[0] == 1  # a token that is written
        return pace * float(sum(buffer.nbytes for buffer in layer.weight.buffers()))

    monkeypatch.setattr(latency, "seconds", clock)
    whole = run(place, tmp_path / "a", method="weight-error", budget="latency=15")
    assert 12 < whole["cost"] <= 15 and whole["unit"] == "milliseconds of the searched layers"
    assert whole["total"] == sum(row["bytes"] for row in whole["layers"]) * 1000 and whole["threads"]
    with pytest.raises(UsageError, match=r"1.0 milliseconds of the searched layers is infeasible.*the least is \d"):
        run(place, tmp_path / "b", method="weight-error", budget="latency=1")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def killed(self: Predictions) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Predictions, "divergence", killed)
        with pytest.raises(KeyboardInterrupt):
            run(place, tmp_path / "b", method="weight-error", budget="latency=15")
    pace = 1e-3
    again = SearchSettings(samples=2, seq_len=24, random=2, resume=True)
    assert run(place, tmp_path / "b", method="weight-error", budget="latency=15", settings=again) == whole


def test_bad_requests_leave_nothing(place: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", place / "model"
    quantize(model, "rtn", out=tmp_path / "q", weights="int4 group=16")
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"budget": "bits=1.9"}, UsageError, "1.9 mean bits of a weight is infeasible with this menu; the least is 2"),
        ({"budget": "bops=1"}, UsageError, "infeasible"),
        ({"budget": "bits"}, UsageError, "a cost and a number above 0"),
        ({"budget": "bits=-4"}, UsageError, "a number above 0"),
        ({"budget": "bit=4"}, UsageError, "unknown cost 'bit'"),
        ({"method": "hawk"}, UsageError, "unknown search recipe 'hawk'.*hawq"),
        ({"menu": "int4 group=48,int8"}, UsageError, "q_proj: 32 columns, and group=48 does not"),
        ({"menu": "uint4 group=16,int8"}, SchemeError, "weights are signed and uint4 is not"),
        ({"menu": "int4 group=16,nf4 flat=64", "targets": ["mlx"]}, SchemeError, "MLX can't hold"),
        ({"groups": [["model.layers.0.mlp.up_proj"]]}, UsageError, "is in no group"),
    ]  # fmt: skip
    for changes, error, message in bad:
        with pytest.raises(error, match=message):
            run(place, out, **changes)
    with pytest.raises(ModelError, match="is quantized already"):
        search(tmp_path / "q", out, budget="bits=4")
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_the_command(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "search",
        str(place / "model"),
        str(tmp_path / "o"),
        "--budget",
        "bops=9000000",
        "--method",
        "weight-error",
    ]
    more = ["--data", str(place / "text.txt"), "--samples", "1", "--seq-len", "16", "--random", "1", "--json"]
    monkeypatch.setattr("sys.argv", ["nybble", *words, *more, "--activations", "int8 token"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code in (0, None), shown.err
    found = json.loads(shown.out)
    assert found == json.loads((tmp_path / "o" / "search.json").read_text())
    assert found["total"] == sum(row["cost"] for row in found["layers"]) <= 9000000
    assert all(row["cost"] == row["macs"] * row["bits"] * 8 for row in found["layers"])
    assert parse_scheme(found["scheme"]).rules[0].inputs is not None
    page = (tmp_path / "o" / "search.html").read_text()
    drawn = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [layer["name"] for layer in drawn["layers"]] == [layer["name"] for layer in found["layers"]]
    assert drawn["front"] == found["front"] and "reversed order" in {row["name"] for row in drawn["compared"]}


def test_formats_of_both_sides_against_modelled_cycles(place: Path, tmp_path: Path) -> None:
    """DyBit's search: half of the cycles of 8 bits; a menu has pairs, and the scheme what enters each layer."""
    menu = [f"dybit{w} channel / dybit{x}" for w in (8, 4, 2) for x in (8, 4, 2)]
    settings = SearchSettings(samples=1, seq_len=16, random=0)
    asked: dict[str, Any] = {"method": "dybit", "menu": menu, "settings": settings}
    eight = run(place, tmp_path / "eight", budget="cycles=1e9", **asked)
    assert {row["chosen"] for row in eight["layers"]} == {menu[0]}
    found = run(place, tmp_path / "half", budget=f"cycles={eight['total'] // 2}", **asked)
    assert found["total"] <= found["limit"] == eight["total"] // 2 and found["unit"].startswith("modelled")
    scheme = parse_scheme(yaml.safe_load((tmp_path / "half" / "scheme.yaml").read_text()))
    assert [f"{rule.weights} / {rule.inputs}" for rule in scheme.rules] == [row["chosen"] for row in found["layers"]]
    assert len({row["chosen"] for row in found["layers"]}) > 1


def test_orders_of_hawq(place: Path, tmp_path: Path) -> None:
    """Bits go by the eigenvalue of a weight (S), the order by what the chosen formats lose (Omega)."""
    found = run(place, tmp_path / "a", method="hawq-v1", settings=replace(SMALL, random=0, samples=1, seq_len=12))
    rows = {row["name"]: row for row in found["layers"]}
    sharp = [
        (
            sum(rows[n]["sharpness"] * rows[n]["elements"] for n in group) / sum(rows[n]["elements"] for n in group),
            group,
        )
        for group in found["groups"]
    ]
    bits = [rows[group[0]]["bits"] for _, group in sorted(sharp, reverse=True)]
    assert bits == sorted(bits, reverse=True) and len(set(bits)) > 1
    assert found["order"] == sorted(rows, key=lambda name: -rows[name]["loss"]) and found["order"] != [*rows]
    assert all(row["loss"] in row["sensitivity"] for row in found["layers"])
