"""A scale that is given: its number to float32's last bit, in a line too; ModelOpt's ``k_scale`` is amax / 448."""

from __future__ import annotations

import pytest
import torch

from nybble.core.errors import UsageError
from nybble.kv_format import fixed_at, fixed_scale
from nybble.quantizer import Quantizer


def test_codes_are_torchs_under_the_scale() -> None:
    scale = (torch.tensor(9.375) / 448).item()  # 0.02092633955180645 of modelopt 0.47 for that amax
    assert scale == 0.02092633955180645
    x = torch.randn(2, 3, 5, 16) * 4
    found = fixed_at("float8_e4m3fn", scale).quantize(x)
    wanted = (x / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * torch.tensor(scale)
    assert torch.equal(found.dequantize(), wanted)


def test_the_line_holds_the_number() -> None:
    for scale in (torch.rand(64) * torch.logspace(-6, 3, 64)).tolist():
        line = str(fixed_at("float8_e4m3fn", scale))
        assert fixed_scale(Quantizer(line)) == scale
    assert fixed_scale(Quantizer("float8_e4m3fn token scale=fixed(value=0.5) scale_format=float16")) is None


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_what_is_no_scale(value: str) -> None:
    with pytest.raises(UsageError, match="a scale is a positive number"):
        Quantizer(f"int8 token scale=fixed(value={value})")
