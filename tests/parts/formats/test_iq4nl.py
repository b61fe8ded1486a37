"""Values: ggml-common.h, ``kvalues_iq4nl``, as the package gguf has them."""

import pytest

from nybble.formats import get_format


def test_golden_values() -> None:
    quants = pytest.importorskip("gguf.quants")
    assert get_format("iq4nl").values.tolist() == list(quants.IQ4_NL.kvalues)
    assert get_format("iq4nl").bits == 4
