"""What ``--json`` prints of numbers that JSON has no word for."""

from __future__ import annotations

import json
import math

import pytest

from nybble.cli._output import print_json
from nybble.cli.formats import _unused
from nybble.formats import get_format


def test_infinities_have_signs(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [math.inf, -math.inf, math.nan, 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": ["inf", "-inf", None, 1.5]}


def test_codes_of_no_number_are_not_called_unused() -> None:
    assert _unused(get_format("float8_e5m2")) == []
    assert _unused(get_format("int4")) == [8]
