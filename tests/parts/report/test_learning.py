"""Rows about windows: how long each took, where somebody kept it."""

from __future__ import annotations

from typing import Any

import pytest

from nybble.core.errors import FileError
from nybble.report.checks import check_times
from nybble.report.learning import windows_of


def entry(window: str, **more: Any) -> dict[str, Any]:
    found = {"window": window, "blocks": 1, "loss": "mse", "before": 2.0, "after": 1.0, "steps": 10}
    return {**found, "kept": "last", "diverged": False, "curve": [[0.0, 2.0], [9.0, 1.0]], **more}


def test_times_are_those_of_each_learning_in_order() -> None:
    rows = [
        {"learned": {"windows": [entry("window-0000"), entry("window-0000", loss="l2-kl"), entry("model")]}},
        {"learned": {"windows": [entry("window-0001")]}},
    ]
    times = {"window-0000": [0.123456, 12.34], "window-0001": [1234.5], "elsewhere": [3.0]}
    assert [row["time"] for row in windows_of(rows, times)] == ["0.12 s", "12 s", "", "1,234 s"]
    assert [row["time"] for row in windows_of(rows)] == [""] * 4
    assert times["window-0000"] == [0.123456, 12.34]


@pytest.mark.parametrize("seconds", [3.0, ["1"], [-1.0], [float("nan")], None])
def test_wrong_times(seconds: Any) -> None:
    with pytest.raises(FileError, match=r"^times\.json: 'window-0000' took"):
        check_times({"window-0000": seconds}, "times.json")
    check_times({"window-0000": [1.5, 2]}, "")
