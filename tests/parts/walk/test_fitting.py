"""Which settings make a run fit: the mildest of each kind, then together, then none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_model

import nybble
from nybble.core import device
from nybble.core.errors import DeviceError
from nybble.walk.fitting import fitting
from nybble.walk.steps import Load

LOAD = Load(samples=64, seq_len=256, batch=8, dtype=torch.bfloat16, source_bytes=2, window=2)
GB = 1_000_000_000


def memory(load: Load, narrow: bool) -> int:
    """2 for a block, a tenth for a sample, a half for every sample of a batch; 1 that nothing changes."""
    blocks = 1 if narrow else load.window
    hidden = 0.0 if load.spilled else 0.1 * load.samples * load.seq_len / 256
    return int(GB * (1 + 2 * blocks + hidden + 0.5 * load.batch))


def test_each_kind_by_itself_as_mild_as_can_be() -> None:
    assert memory(LOAD, False) == int(15.4 * GB)
    assert fitting(LOAD, 13 * GB, memory) == (
        "Each of these fits by itself: --batch 2 (12.4 GB); --spill (9.0 GB); --samples 32 (12.2 GB); "
        "--seq-len 128 (12.2 GB)."
    )


def test_together_where_none_is_enough() -> None:
    found = fitting(LOAD, 5 * GB, memory)
    assert found == "Together these fit: window: 1 and overlap: 0 in the recipe, --batch 1, --spill (3.5 GB)."


def test_nothing_is_enough() -> None:
    found = fitting(LOAD, GB, memory)
    assert found == (
        "No setting is enough: with window: 1 and overlap: 0 in the recipe, --batch 1, --spill, --samples 8, "
        "--seq-len 128 it takes 3.5 GB."
    )
    alone = Load(samples=0, seq_len=0, batch=8, dtype=torch.bfloat16, source_bytes=2)
    assert fitting(alone, GB, memory) == "No setting makes it smaller."


def test_what_is_said_to_fit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proposed batch passes the same check, the next larger one doesn't."""
    ids = torch.ones(64, 60).long()
    recipe = {"scheme": {"weights": "int4 group=16"}, "steps": [{"solver": "gptq"}]}

    def refused(batch: int) -> str:
        with pytest.raises(DeviceError) as error:
            nybble.preflight(tiny_model(), recipe, ids, settings={"batch": batch})
        return str(error.value)

    monkeypatch.setattr(device, "available_memory", lambda: 301_500_000)
    said = refused(64)
    proposed = int(said.partition("--batch ")[2].split()[0])
    assert nybble.preflight(tiny_model(), recipe, ids, settings={"batch": proposed})
    assert f"--batch {proposed} " in refused(2 * proposed)


def test_a_folder_is_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(device, "available_memory", lambda: 10)
    with pytest.raises(DeviceError, match="No setting makes it smaller"):
        nybble.quantize(tmp_path / "model", "rtn", out=tmp_path / "out", weights="int4 group=16")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
