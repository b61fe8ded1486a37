"""``nybble formats NAME --plot FILE``: what is drawn, read back from matplotlib's own objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nybble.cli._plot import draw_distances, draw_values, plot_format
from nybble.core.errors import FileError, UsageError
from nybble.formats import get_format


def axes() -> Any:
    """Two axes of a figure that no window shows."""
    from matplotlib.figure import Figure

    return Figure().subplots(2, 1, sharex=True)


def test_the_last_step_reaches_the_largest_value() -> None:
    (_, bottom) = axes()
    draw_distances(get_format("e2m1"), bottom)
    (steps,) = bottom.patches
    values, edges, _ = steps.get_data()
    assert edges.tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert values.tolist() == [2, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 1, 2]
    drawn = steps.get_path().vertices
    assert drawn[-3:-1].tolist() == [[4, 2], [6, 2]]  # flat from 4 to 6


@pytest.mark.parametrize(
    ("name", "kind"),
    [("e2m1", "linear"), ("binary", "linear"), ("e4m3", "linear"), ("float8_e5m2", "symlog"), ("udynamic8", "symlog"),
     ("float8_e8m0fnu", "log")],
)  # fmt: skip
def test_both_axes_show_the_same_values(name: str, kind: str) -> None:
    fmt = get_format(name)
    top, bottom = axes()
    draw_values(fmt, top)
    draw_distances(fmt, bottom)
    assert top.get_xlim() == bottom.get_xlim() and top.get_xscale() == bottom.get_xscale() == kind
    low, high = bottom.get_xlim()
    assert low < fmt.min and fmt.max < high
    marks = [position for line in top.collections for position in line.get_positions()]
    assert marks == fmt.grid.tolist()


def test_a_picture_is_written(tmp_path: Path) -> None:
    plot_format(get_format("binary"), tmp_path / "binary.svg")
    text = (tmp_path / "binary.svg").read_text()
    assert "<svg" in text and "2 values in 1 bit, -1 to 1" in text


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("none/a.png", FileError, "No such file or directory"),
        ("a.foo", UsageError, "ends in .png, .svg or .pdf"),
        ("a", UsageError, "ends in .png, .svg or .pdf"),
    ],
)
def test_a_place_that_takes_no_picture(place: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        plot_format(get_format("int2"), tmp_path / place)
    assert not list(tmp_path.iterdir())


def test_both_axes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zoomed or limited, values and distances stay above each other."""
    seen: list[Any] = []
    monkeypatch.setattr("nybble.cli._plot.draw_distances", lambda fmt, axes: seen.append(axes))
    plot_format(get_format("e2m1"), tmp_path / "x.svg")
    (bottom,) = seen
    assert len(bottom.get_shared_x_axes().get_siblings(bottom)) == 2
