"""Parts in order of preference: each quantizer has the first that can learn it."""

from __future__ import annotations

import pytest
import torch

from nybble.core.errors import SchemeError
from nybble.learned import ACTIVATIONS, WEIGHTS, make_part
from nybble.learned._first_of import FirstOf
from nybble.learned.elastic import ElasticScale
from nybble.learned.ste import StraightThrough
from nybble.quantizer import Quantizer

SEVERAL = FirstOf([make_part("elastic", {}), make_part("ste", {"mask": 2.5})])


def test_the_first_that_can() -> None:
    x = torch.linspace(-4, 4, 9)[None]
    static, measured = Quantizer("ternary tensor static scale=elastic"), Quantizer("int8 tensor scale=clamped")
    assert isinstance(SEVERAL.make(static, x, side=ACTIVATIONS), ElasticScale)
    made = SEVERAL.make(measured, x, side=ACTIVATIONS)
    assert isinstance(made, StraightThrough) and made.mask == 2.5


def test_what_none_can_learn_is_told_by_the_first() -> None:
    stochastic = Quantizer("int8 tensor rounding=stochastic")
    with pytest.raises(SchemeError, match="elastic can't learn"):
        SEVERAL.check(stochastic, ACTIVATIONS)
    with pytest.raises(SchemeError, match="list of learned parts is empty"):
        FirstOf([])
    with pytest.raises(SchemeError, match="adaround keeps the weight as it is, and stands alone"):
        FirstOf([make_part("ste", {}), make_part("adaround", {})])
    FirstOf([make_part("adaround", {})]).check(Quantizer("int4 channel"), WEIGHTS)
