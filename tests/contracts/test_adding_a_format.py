"""A new format is one file: dropped into the folder, the registry finds it and every contract holds for it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import nybble.formats as formats
from nybble.core.registry import Registry
from nybble.quantizer import Quantizer

SOURCE = '''"""Powers of two and zero, both signs: a format that a test adds."""

from nybble.formats import TableFormat

PART = TableFormat("powers3", 3, table=(0.0, 1.0, 2.0, 4.0, -1.0, -2.0, -4.0, 8.0))
'''


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "powers3.py").write_text(SOURCE)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    monkeypatch.setattr(formats, "REGISTRY", Registry("nybble.formats", "number format"))
    formats.get_format.cache_clear()
    importlib.invalidate_caches()
    return "powers3"


def test_one_file_makes_a_format(added: str) -> None:
    assert added in formats.format_names()
    fmt = formats.get_format(added)
    for code, value in enumerate(fmt.values):
        found = fmt.grid_codes[list(fmt.grid).index(value)]
        assert found == code
    quantizer = Quantizer(f"{added} group=16 scale=mse(low=0.2,high=2.0,grid=30)")
    x = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.fake_quantize(x), quantizer.quantize(x).dequantize())
    nearest = (x[..., None] - torch.from_numpy(fmt.grid).float()).abs().amin(-1)
    plain = Quantizer(f"{added} scale=one").fake_quantize(x)
    assert torch.equal((plain - x).abs(), nearest)
