from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from nybble.core.progress import Bars, Progress, Silent, task


def _bars(terminal: bool = False) -> tuple[Bars, io.StringIO]:
    screen = io.StringIO()
    return Bars(Console(file=screen, width=120, force_terminal=terminal)), screen


def test_a_bar_shows_what_count_and_note() -> None:
    bars, screen = _bars()
    with task(bars, 3, "blocks [bold]") as bar:
        bar.advance(note="model.layers.0")
        bar.advance(2, note="layers[red]")
    shown = screen.getvalue()
    assert "blocks [bold]" in shown  # brackets are text, not Rich markup
    assert "3/3" in shown
    assert "layers[red]" in shown
    assert "model.layers.0" not in shown.splitlines()[-1]


def test_tasks_nest_and_the_outer_one_stays() -> None:
    bars, screen = _bars()
    with task(bars, 2, "outer"):
        with task(bars, 5, "inner"):
            bars.advance(5)
        bars.advance()
    shown = screen.getvalue()
    assert "1/2" in shown
    assert "inner" not in shown.splitlines()[-1]
    with task(bars, 1, "again"):  # the screen can be used once more
        bars.advance()
    assert "again" in screen.getvalue()


def test_an_error_inside_ends_the_bar() -> None:
    bars, screen = _bars(terminal=True)
    with pytest.raises(KeyError), task(bars, 2, "outer"):
        raise KeyError
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is shown again
    with pytest.raises(RuntimeError, match=r"advance\(\) before start"):
        bars.advance()


def test_bars_draw_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with task(Bars(), 1, "blocks") as bar:
        bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert "blocks" in err


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Progress = Silent()
    with task(progress, 2, "blocks") as bar:
        bar.advance(2, "note")
    assert capsys.readouterr() == ("", "")


def test_rich_is_loaded_only_for_a_bar() -> None:
    code = "import sys, nybble.core.progress as p; p.Bars(); assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
