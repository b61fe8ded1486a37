"""Golden values: 4-bit optimizer sheet, T(i) = (i + 1) / 16."""

from __future__ import annotations

import pytest

from nybble.core.errors import FormatError
from nybble.formats import get_format


def test_table() -> None:
    assert get_format("linear4").values.tolist() == [(i + 1) / 16 for i in range(16)]
    assert get_format("linear8").values.tolist() == [(i + 1) / 256 for i in range(256)]
    assert get_format("linear4").min == 0.0625


def test_impossible() -> None:
    with pytest.raises(FormatError, match="1 to 8 bits"):
        get_format("linear9")
