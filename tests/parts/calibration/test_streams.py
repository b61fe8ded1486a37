"""Named tensors from block to block, in memory and in files; blocks over two streams; the model's own errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nybble.calibration.streams import Stream
from nybble.calibration.tail import tail
from nybble.calibration.trace import HIDDEN, BlockCall, capture_block_calls
from nybble.core.errors import ModelError
from nybble.models.adapter import Adapter, Flow, adapter_for

CALL = BlockCall(index=0, args=(), kwargs={}, keyword=None, start=None)


@pytest.mark.parametrize("spilled", [False, True])
def test_what_is_written_is_read(tmp_path: Path, spilled: bool) -> None:
    spill = tmp_path / "hidden.bin.float.0" if spilled else None
    stream = Stream(6, torch.device("cpu"), spill)
    x, bias = torch.randn(6, 3, 4), torch.randn(1, 2, 3, 3)
    for start, stop in ((0, 2), (2, 4), (4, 6)):
        stream.begin(start, [CALL], {HIDDEN: x[start:stop], "bias": bias * start})
    assert list(stream) == [0, 2, 4] and stream.finite()
    twin = stream.fork()
    stream.write(2, {HIDDEN: x[2:4] * 2, "more": torch.ones(2, 7)})
    for start, stop in ((0, 2), (2, 4), (4, 6)):
        found = stream.read(start)
        assert torch.equal(found[HIDDEN], x[start:stop] * (2 if start == 2 else 1))
        assert torch.equal(found["bias"], bias * start)
        assert torch.equal(twin.read(start)[HIDDEN], x[start:stop])  # the copy goes its own way
    assert torch.equal(stream.read(2)["more"], torch.ones(2, 7))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == (["hidden.bin.float.0.hidden", "hidden.bin.float.0.more"] if spilled else [])
    stream.write(4, {HIDDEN: x[4:] * torch.inf})
    assert not stream.finite() and twin.finite()
    twin.write(0, {"bias": bias * torch.nan})  # one for all samples
    assert not twin.finite()
    stream.close()
    assert not list(tmp_path.iterdir())


class TwoStreams(nn.Module):
    """Blocks over two streams of tokens, as in multimodal diffusion transformers: both in, (text, image) out."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            image = self.image(hidden_states) + encoder_hidden_states.mean(1, keepdim=True) * scale
            return self.text(encoder_hidden_states), image

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            text, image = block(image, encoder_hidden_states=text, scale=0.5)
        return image


def test_two_streams_go_from_block_to_block() -> None:
    flows = (Flow(name="text", gives=0, takes="encoder_hidden_states"),)
    adapter = Adapter(
        name="two", model_types=(), blocks="blocks", embeddings=(), final_norm=None, head=None, flows=flows
    )
    model, image, text = TwoStreams().eval(), torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    calls = capture_block_calls(model, {"image": image, "text": text}, adapter=adapter)
    given: Any = calls[0].start
    assert set(given) == {HIDDEN, "text"} and torch.equal(given["text"], text)
    for call, block in zip(calls, model.blocks, strict=True):
        given = call.run(block, given)
    assert torch.equal(given[HIDDEN], model(image, text))
    stream = Stream(2, torch.device("cpu"))
    stream.begin(0, calls, calls[0].start or {})
    for index, block in enumerate(model.blocks):
        stream.write(0, calls[index].run(block, stream.read(0)))
    assert torch.equal(stream.read(0)[HIDDEN], model(image, text))


@torch.no_grad()
def test_the_models_own_error_is_said() -> None:
    """Not "doesn't call its blocks": a fault in the embeddings is named, and a full memory stays what it is."""
    model = tiny_model("llama")

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such token")

    model.model.embed_tokens.forward = broken
    with pytest.raises(ModelError, match="fails before its blocks are reached: ValueError: no such token"):
        capture_block_calls(model, input_ids())

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.embed_tokens.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        capture_block_calls(model, input_ids())
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList(reversed(model.model.layers))
    adapter = Adapter(name="x", model_types=(), blocks="model.layers", embeddings=(), final_norm=None, head=None)
    forward = model.model.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        model.model.layers[1](torch.zeros(2, 12, 32, dtype=torch.bfloat16))
        return forward(*args, **kwargs)

    model.model.forward = twice
    with pytest.raises(ModelError, match="doesn't call its 2 blocks one after the other"):
        capture_block_calls(model, input_ids(), adapter=adapter)


@torch.no_grad()
def test_the_tail_reaches_every_module_that_is_watched() -> None:
    """The model runs from its last block on, until the last of them has its input."""
    model = tiny_model("mistral", torch.float32)
    seen: dict[str, Tensor] = {}
    for name in ("model.norm", "lm_head"):
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    hidden = torch.randn(2, 12, 32)
    call = tail(adapter_for(model), {"input_ids": input_ids()}, None, ["model.norm", "lm_head"])
    assert torch.equal(call.run(model, {HIDDEN: hidden})[HIDDEN], hidden)
    assert torch.equal(seen["model.norm"], hidden) and torch.equal(seen["lm_head"], model.model.norm(hidden))
