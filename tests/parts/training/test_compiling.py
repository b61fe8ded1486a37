"""Blocks through a compiler while a twin trains: the same numbers, compiled once for all, nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from nybble.core.errors import UsageError
from nybble.core.progress import Silent
from nybble.training import compiling
from nybble.training.loop import train
from nybble.training.prepare import prepare
from nybble.training.settings import TrainSettings

pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'nybble[train]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # dynamo's own
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # as is this
]


def rows() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    made = [torch.randint(3, 50, (length,), generator=draw) for length in (12, 12, 9, 9)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def trained(folder: Path, **more: Any) -> Any:
    scheme = {"weights": "int4_full channel scale=learned", "inputs": "int4 tensor static scale=learned"}
    example = torch.arange(3, 15)[None]
    model = prepare(
        tiny_model(dtype=torch.float32, num_hidden_layers=3), scheme, {"weights": "lsq", "inputs": "lsq"},
        run=lambda net: net(input_ids=example),
    )  # fmt: skip
    settings = TrainSettings(batch=2, accumulate=1, save_every=2, lr=1e-2, dtype="float32", **more)
    return model, train(model.train(), rows(), settings, folder, Silent())


@pytest.mark.slow
def test_blocks_are_compiled_once_and_train_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    (plain, run), (compiled, again) = (trained(tmp_path / str(c), compile=c) for c in (False, True))
    assert 1 <= counter.frame_count <= 2  # three blocks; the first forward is another: what it keeps is counted
    assert run.curve == again.curve and len(run.curve) == 2
    wanted, found = plain.state_dict(), compiled.state_dict()
    assert list(wanted) == list(found)
    for name, value in wanted.items():
        assert not isinstance(value, Tensor) or torch.equal(value, found[name]), name
    assert all(module._compiled_call_impl is None for module in compiled.modules())


def test_a_network_without_blocks() -> None:
    refused = pytest.raises(UsageError, match=r"Linear has no blocks.*leave it out")
    with refused, compiling.compiled_blocks(nn.Linear(2, 2)):
        pass
