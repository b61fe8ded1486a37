"""Places where channels may be rescaled: blocks compute the same with any factors and shifts, not with untied ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from nybble.calibration.block import BlockState
from nybble.calibration.folds import places_of
from nybble.calibration.trace import HIDDEN, capture_block_calls
from nybble.learned.transforms import Place
from nybble.models.adapter import QueryKeyFold, adapter_for, query_key_rows

#: family -> kinds of places, in order, and how many of them can be shifted
FOUND = {
    "llama": ("norm norm attention linear product", 1),  # with biases in attention
    "mistral": ("norm norm attention linear product", 0),
    "qwen3": ("norm norm attention linear", 0),  # norms of queries and keys
    "smollm3": ("norm norm attention linear product", 0),
    "gemma2": ("norm norm attention linear product", 0),
    "opt": ("norm norm attention linear product", 3),
    "gpt2": ("norm norm attention product", 3),
    "gpt_neox": ("norm norm attention product", 3),
    "bloom": ("norm norm attention product", 3),
    "mixtral": ("norm norm attention product", 0),
    "bert": ("attention product", 1),
    "vit": ("norm norm attention product", 3),
}


def sized(kind: Any, **more: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return kind(**sizes, **more)


def model_of(family: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    tokens = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    if family == "bert":
        make: Any = BertModel
        return make(sized(BertConfig, vocab_size=60)).to(dtype).eval(), {"input_ids": tokens}
    if family == "vit":
        make = ViTModel
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return make(sized(ViTConfig, image_size=8, patch_size=4)).to(dtype).eval(), {"pixel_values": images.to(dtype)}
    return tiny_model(family, dtype), {"input_ids": tokens}


class Made:
    """A first block, whose biases and norms are no zeros and ones, and its inputs."""

    def __init__(self, family: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        model, given = model_of(family, dtype)
        adapter = adapter_for(model)
        (name, *_), self.config = adapter.block_names(model), model.config
        block = model.get_submodule(name).requires_grad_(False)
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
        with torch.no_grad():
            self.call = capture_block_calls(model, given)[0]
        self.state, self.adapter = BlockState(block, name), adapter
        self.places = [place for place, _ in places_of(self.state, adapter, model.config)]

    @torch.no_grad()
    def output(self) -> Tensor:
        assert self.call.start is not None
        return self.call.run(self.state.module, self.call.start)[HIDDEN].float()

    def rescale(self, place: Place, seed: int = 1, shift: bool = True) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        units = int(place.units.max()) + 1
        given = {"factor": (torch.rand(units, generator=generator) * 3 + 0.3)[place.units]}
        if place.shifts and shift:
            given["shift"] = torch.randn(units, generator=generator)[place.units]
        new = place.function({name: self.state.get(name) for name in place.weights}, given)
        for name, value in new.items():
            self.state.put(name, value)
        return given


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", FOUND)
def test_the_block_computes_the_same(family: str) -> None:
    """Every place alone, then all of them together; each really changed its weights."""
    kinds, shifted = FOUND[family]
    made = Made(family)
    assert [place.kind for place in made.places] == kinds.split()
    assert sum(place.shifts for place in made.places) == shifted
    before = made.output()
    close: dict[str, Any] = {
        "rtol": 1e-4,
        "atol": 2e-5 * float(before.abs().max()),
    }  # of float32's sums in another order
    for place in made.places:
        alone = Made(family)
        old = {name: alone.state.get(name).clone() for name in place.weights}
        alone.rescale(next(p for p in alone.places if p.name == place.name))
        torch.testing.assert_close(alone.output(), before, **close)
        assert all(not torch.equal(old[name], alone.state.get(name)) for name in place.weights), place.name
    for seed, place in enumerate(made.places):
        made.rescale(place, seed)
    torch.testing.assert_close(made.output(), before, **close)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_rotary_embedding_ties_two_channels(family: str) -> None:
    """With a factor of its own for each channel of a head the block computes something else."""
    made = Made(family)
    before = made.output()
    (place,) = [place for place in made.places if place.kind == "product"]
    (fold,) = made.adapter.query_key_folds
    tied = int(place.units.max()) + 1
    made.rescale(place)
    torch.testing.assert_close(made.output(), before, rtol=1e-4, atol=2e-5 * float(before.abs().max()))
    adapter = replace(made.adapter, query_key_folds=(replace(fold, rotary=False),))
    (free,) = [p for p, _ in places_of(made.state, adapter, made.config) if p.kind == "product"]
    rotated = {"llama": 8, "gpt_neox": 2}[family]  # of 8 channels of a head
    assert tied / (int(free.units.max()) + 1) == (8 - rotated / 2) / 8
    made.rescale(free)
    assert float((made.output() - before).abs().max()) > 0.01 * float(before.std())


def test_query_heads_share_what_their_key_head_has() -> None:
    """Four heads of queries over two of keys, eight channels each: by hand."""
    config = Made("llama").config
    queries, keys = query_key_rows(QueryKeyFold(query="q", key="k", rows="value_heads", rotary=True), config, 32)
    pairs = [0, 1, 2, 3, 0, 1, 2, 3]
    one, other = pairs, [4 + unit for unit in pairs]
    assert queries[0].tolist() == list(range(32)) and keys[0].tolist() == list(range(16))
    assert queries[1].tolist() == one + one + other + other and keys[1].tolist() == one + other
    values = next(place for place in Made("llama").places if place.kind == "attention")
    assert values.units.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]


def test_readers_get_what_a_norm_in_16_bits_really_lost() -> None:
    """Its new bias is rounded; W diag(s) x' + b' is W x + b for the norm as it then is, to float32's rounding."""
    made = Made("opt", torch.bfloat16)
    place = made.places[0]
    (norm,), reader = place.makers, place.readers[0]
    plain = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))  # what the norm makes before its weights

    def result() -> Tensor:
        x = plain * made.state.get(f"{norm}.weight") + made.state.get(f"{norm}.bias")
        return x @ made.state.get(f"{reader}.weight").mT + made.state.get(f"{reader}.bias")

    before = result()
    made.rescale(place)
    live = made.state.module.get_submodule(norm)
    for name in ("weight", "bias"):
        assert getattr(live, name).dtype == torch.bfloat16
        assert torch.equal(getattr(live, name).float(), made.state.get(f"{norm}.{name}"))
    torch.testing.assert_close(result(), before, rtol=1e-4, atol=1e-4 * float(before.std()))
