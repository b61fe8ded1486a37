from __future__ import annotations

from typing import Any

import pytest

from nybble.cli import main


@pytest.fixture
def nybble_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The command in this process: its exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["nybble", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capfd.readouterr()

    return run
