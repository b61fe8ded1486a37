from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.parts.report.synthetic import evaluation, learned, manifest

from nybble.core.errors import FileError
from nybble.report.checks import check_evaluation, check_manifest

GOOD = manifest(1)
GOOD["layers"][3]["learned"] = learned(0)
NO_PICTURE = {"weight_picture": None, "input_picture": None, "clip": None, "input_shifts": None, "input_scale": None}
# What is wrong -> where in a row, what is put there.
WRONG: dict[str, tuple[tuple[str, ...], Any]] = {
    "shape of words": (("shape",), ["a", "b"]),
    "negative shape": (("shape",), [-1, 5]),
    "no bits": (("bits",), None),
    "infinite error": (("error",), float("inf")),
    "NaN": (("sqnr",), float("nan")),
    "true": (("bits",), True),
    "huge": (("bits",), 10**400),
    "two clips": (("clip",), [0.5, 1.0]),
    "shifts": (("input_shifts",), [-1]),
    "note": (("notes",), [5]),
    "picture": (("weight_picture",), "histogram"),
    "edge": (("weight_picture", "edge"), 0),
    "counts": (("weight_picture", "counts"), [1, 2, "3"]),
    "many counts": (("weight_picture", "counts"), [1] * 5000),
    "format": (("weight_picture", "format"), "float99"),
    "clipped": (("weight_picture", "clipped"), None),
    "histogram": (("input_picture", "histogram"), None),
    "channels": (("input_picture", "channels"), [[1.0]]),
    "inter": (("input_picture", "inter"), -1.0),
    "learned": (("learned",), 3),
    "windows": (("learned", "windows"), [5]),
    "left nearest": (("learned", "left_nearest"), "many"),
    "scales": (("learned", "scales"), [1.0]),
    **{
        f"window's {key}": (("learned", "windows"), [{**learned(0)["windows"][0], key: value}])
        for key, value in (
            ("window", 3),
            ("loss", None),
            ("blocks", -1),
            ("steps", 2.5),
            ("before", float("nan")),
            ("after", "0"),
            ("kept", None),
            ("diverged", "no"),
            ("precision", 16),
            ("curve", [[1.0]]),
            ("curve", [[0.0, -1.0]] * 2),
        )
    },
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_value_is_named(what: str) -> None:
    keys, value = WRONG[what]
    wrong = copy.deepcopy(GOOD)
    place = wrong["layers"][3]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(FileError, match=rf"^x/nybble\.json: layer '.*o_proj' has {keys[0]} = .*nybble quantize"):
        check_manifest(wrong, "x/nybble.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "lists no layers"),
        ({"layers": None}, "lists no layers"),
        ({"layers": [5]}, "layer 0 has no name"),
        ({"layers": [{"name": "a"}]}, "layer 'a' has no 'shape'"),
        ({"recipe": "gptq"}, "names no recipe"),
    ],
)
def test_missing_parts_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        check_manifest(GOOD | change, "nybble.json")


def test_good_ones_pass() -> None:
    check_manifest(GOOD, "")
    check_manifest(GOOD | {"layers": [row | NO_PICTURE for row in GOOD["layers"]]}, "")
    old = [{k: v for k, v in row.items() if k not in NO_PICTURE} for row in GOOD["layers"]]
    check_manifest(GOOD | {"layers": old}, "")
    check_evaluation(evaluation(), "")
    check_evaluation({}, "")


@pytest.mark.parametrize(
    "change",
    [
        {"models": []},
        {"models": {"float": 5}},
        {"data": "text"},
        {"samples": {}},
        {"samples": [{"float": "x"}]},
        {"samples": [{"prompt": 5}]},
        {"samples": [{"prompt": "one", "audio": "https://elsewhere.example/a.wav", "float": "one"}]},
    ],
)
def test_wrong_evaluation(change: dict[str, Any]) -> None:
    with pytest.raises(FileError, match=r"^evaluation\.json: '(models|data|samples)'"):
        check_evaluation(evaluation() | change, "evaluation.json")
