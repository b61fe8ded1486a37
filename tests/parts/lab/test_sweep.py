"""Sweeps: what is run, what a run is known by, and what can't be run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.parts.lab.drawn import drawn
from tests.tiny import save_text, save_tiny

from nybble.core.errors import FileError, NybbleError, SchemeError, UsageError
from nybble.lab.spec import RunSpec
from nybble.lab.sweep import load_sweep, parse_sweep


def test_a_grid_is_the_product_of_its_axes_and_grids_are_united() -> None:
    sweep = parse_sweep({
        "name": "two", "kind": "tensor", "base": {"columns": 32},
        "grids": [
            {"weights": ["int3 group=16", "int4 group=16"], "seed": [0, 1]},
            {"weights": "int4 group=16", "seed": [1, 2]},
        ],
    })  # fmt: skip
    found = [(m.spec.options["weights"], m.spec.options.get("seed", 0)) for m in sweep.expand()]
    assert found == [(f"int{b} group=16", s) for b, s in ((3, 0), (3, 1), (4, 0), (4, 1), (4, 2))]


def test_a_template_makes_lines_of_axes_that_are_kept_as_labels() -> None:
    first, *_ = drawn(bits=[3], size=[16], weights="int{bits} group={size}").expand()
    assert first.spec.options["weights"] == "int3 group=16" and first.labels == {"bits": 3, "size": 16}


def test_what_is_excluded_is_no_run() -> None:
    sweep = parse_sweep({
        "name": "less", "kind": "tensor", "base": {"columns": 32},
        "grids": [
            {"weights": ["int3 group=16", "int4 group=16", "nf4 group=16"], "seed": [0, 1]},
            {"weights": "nf4 group=32"},
        ],
        "exclude": [{"weights": "int*", "seed": 1}, {"weights": ["nf4 group=32"]}],
    })  # fmt: skip
    found = [(m.spec.options["weights"], m.spec.options.get("seed", 0)) for m in sweep.expand()]
    assert found == [("int3 group=16", 0), ("int4 group=16", 0), ("nf4 group=16", 0), ("nf4 group=16", 1)]


def test_an_illegal_pair_is_listed_with_its_reason() -> None:
    members = drawn(weights="int{bits} group={group}", bits=[4], group=[16, 24]).expand()
    assert [bool(m.reason) for m in members] == [False, True] and "24 does not divide" in members[1].reason


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"grids": [{"wieghts": ["int4"]}]}, "unknown axis 'wieghts'.*Did you mean 'weights'"),
        ({"grids": [{"weights": "int{bit}", "bits": [4]}]}, "no axis of that name. Did you mean 'bits'"),
        ({"grids": [{"weights": "int4", "seed": ["one"]}]}, "seed"),
        ({"grids": [{"weights": []}]}, "'weights' has no values"),
        ({"kind": "tensr"}, "unknown kind of run 'tensr'.*'tensor'"),
        ({"grid": []}, "no 'grid'. Did you mean 'grids'"),
        ({"name": "a b"}, "has a name of letters"),
        ({"grids": [{"weights": "int4"}], "exclude": [{"weights": "int4"}]}, "nothing is left"),
        ({"exclude": [{}]}, "without an axis"),
        ({"exclude": [{"weights": "int3", "wights": 2}]}, "exclusion 1: no grid has an axis 'wights'.*'weights'"),
    ],
)
def test_what_is_no_sweep_is_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse_sweep({"name": "bad", "kind": "tensor", "grids": [{"weights": "int4"}], **change}).expand()


def test_a_file_is_named_in_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: x\nkinds: tensor\n")
    with pytest.raises(SchemeError, match=r"s\.yaml: a sweep has no 'kinds'"):
        load_sweep(tmp_path / "s.yaml")
    with pytest.raises(NybbleError, match=r"none\.yaml"):
        load_sweep(tmp_path / "none.yaml")


def test_a_key_is_of_what_decides_the_result() -> None:
    """Defaults don't count whether said or not, labels neither; every option and the version do."""
    plain = RunSpec(kind="tensor", version=1, options={"weights": "int3 group=16"})
    said, other = (drawn(bits=[3], **more).expand()[0].spec for more in ({"distribution": "normal"}, {"seed": [1]}))
    assert said.key == drawn(bits=[3]).expand()[0].spec.key != other.key
    assert plain.key != RunSpec(kind="tensor", version=2, options=plain.options).key
    # sha256sum of {"kind":"tensor","options":{"weights":"int3 group=16"},"version":1}
    assert plain.key == "3d223021e142960b06cd63f28c82b10fe6f0158a7c5271ae50e3abea63025e38"


def test_of_a_model_the_contents_count_and_not_its_place(tmp_path: Path) -> None:
    first = save_tiny(tmp_path / "first", vocab_size=64)
    text = save_text(tmp_path / "text.txt")
    shutil.copytree(first, tmp_path / "second")

    def key(model: Path) -> RunSpec:
        grid = {"model": str(model), "data": str(text), "judged_on": str(text)}
        return parse_sweep({"name": "m", "grids": [grid]}).expand()[0].spec

    known = key(first)
    assert known.key == key(tmp_path / "second").key
    known.check_contents()
    with (first / "config.json").open("a") as file:
        file.write(" ")
    assert key(first).key != known.key
    with pytest.raises(FileError, match="has changed since the run was queued"):
        known.check_contents()


def test_a_missing_model_is_an_error_and_not_an_illegal_pair(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="grid 1: there is no"):
        parse_sweep({"name": "m", "grids": [{"model": str(tmp_path / "none")}]}).expand()


def test_a_recipe_that_refuses_its_scheme_is_illegal(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "m", vocab_size=64))
    grid = {"model": model, "recipe": ["rtn", "none", "nope"], "weights": "int4 group=16"}
    members = parse_sweep({"name": "m", "grids": [grid]}).expand()
    reasons = {m.spec.options.get("recipe", "rtn"): m.reason for m in members}
    assert reasons["rtn"] == "" and "takes no weights" in reasons["none"] and "unknown recipe 'nope'" in reasons["nope"]
