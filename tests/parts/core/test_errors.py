from __future__ import annotations

import pytest

from nybble.core.errors import FormatError, NybbleError, UsageError, did_you_mean, within


@pytest.mark.parametrize(
    ("name", "answer"),
    [("gtpq", " Did you mean 'gptq'?"), ("zzz", " Known: gptq, mse, rtn."), ("mse ", " Did you mean 'mse'?")],
)
def test_did_you_mean_gives_the_closest_name_or_all(name: str, answer: str) -> None:
    assert did_you_mean(name, ["rtn", "gptq", "mse"]) == answer


def test_within_places_an_error_once_and_keeps_its_class() -> None:
    with pytest.raises(FormatError) as caught, within("recipe rtn"), within("model.layers.3"):
        raise FormatError("int9 has no codes")
    assert str(caught.value) == "model.layers.3: int9 has no codes"


def test_within_leaves_other_errors_alone() -> None:
    with pytest.raises(ZeroDivisionError, match=r"^bug$"), within("model.layers.3"):
        raise ZeroDivisionError("bug")


def test_a_usage_error_is_a_nybble_error() -> None:
    assert issubclass(UsageError, NybbleError)
    assert issubclass(FormatError, UsageError)
