"""What a conversion reads: bytes that stay are copied, codes move without being taken apart."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from tests.parts.models.layouts import test_compressed_tensors, test_modelopt
from transformers import LlamaConfig, LlamaForCausalLM

import nybble
from nybble.core.finite import all_finite
from nybble.core.memory import new_objects_alone
from nybble.export._opened import OpenedSource
from nybble.models.build import skeleton
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.gguf_file import GgufSource
from nybble.models.sources.open import open_source
from nybble.packing import get_layout
from nybble.packing._nibbles import apart, interleave
from nybble.pipelines.convert import convert
from nybble.pipelines.export import export
from nybble.qtensor import QTensor

FILE = "model.safetensors"


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the packed weights of which all is read."""
    found: list[str] = []
    read = FolderSource.read_packed

    def noted(self: FolderSource, name: str) -> Sequence[QTensor]:
        found.append(name)
        return read(self, name)

    monkeypatch.setattr(FolderSource, "read_packed", noted)
    return found


@pytest.mark.parametrize(
    ("kind", "target"), [("NVFP4", "modelopt"), ("NVFP4", "compressed-tensors"), ("MXFP8", "modelopt")]
)
def test_bytes_that_stay_are_copied(kind: str, target: str, tmp_path: Path, whole: list[str]) -> None:
    folder, _ = test_modelopt.checkpoint(tmp_path / "q", kind)
    line = "auto" if target == "compressed-tensors" else ""  # a last bit moves under the reciprocal
    convert(folder, tmp_path / "there", target, round=line)
    convert(tmp_path / "there", tmp_path / "again", "modelopt", round=line)
    before, after = load_file(folder / FILE), load_file(tmp_path / "again" / FILE)
    assert not whole or line  # that proof reads them
    for name, tensor in after.items():
        if not name.endswith("weight_scale_2"):  # its reciprocal was rounded in between
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8)), name


def test_scales_come_without_codes(tmp_path: Path, whole: list[str]) -> None:
    folder, _ = test_compressed_tensors.checkpoint(tmp_path / "q", *test_compressed_tensors.CASES["pack int4"])
    with_codes = OpenedSource(open_source(str(folder)), tmp_path)
    for layer in with_codes.layers.values():
        for prefix in layer.weights:
            parts = with_codes.scales(layer, prefix).tensors()
            assert parts["codes"].is_meta and not whole
            assert torch.equal(parts["scale"], with_codes.weight(layer, prefix).tensors()["scale"])
            whole.clear()


def test_the_collector_is_left_as_it_was() -> None:
    gc.unfreeze()
    with new_objects_alone(), new_objects_alone():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    gc.freeze()
    with new_objects_alone():
        pass
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_codes_move_two_at_a_time() -> None:
    layout = get_layout("dense")
    low, high = np.random.default_rng(0).integers(0, 256, (2, 6, 12), dtype=np.uint8)
    one, other = (layout.unpack(torch.from_numpy(side).reshape(-1), 4, 144).view(6, 24) for side in (low, high))
    mixed = interleave(low, high)
    assert torch.equal(torch.from_numpy(mixed), one | other << 4)
    for side, again in zip((low, high), apart(mixed), strict=True):
        assert np.array_equal(side, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_finite_numbers_are_told_by_their_bits(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    numbers = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny / 2], dtype=torch.float64).to(dtype).repeat(70_001)
    assert all_finite(numbers) and all_finite(numbers[:0])
    for bad in (torch.nan, torch.inf, -torch.inf):
        numbers[-1] = bad
        assert not all_finite(numbers) and not all_finite(numbers.view(5, -1).T)


@pytest.mark.parametrize("case", ["pack int4", "pack int3", "pack int8 zeros", "int8 channel"])
def test_packed_words_are_copied(case: str, tmp_path: Path, whole: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From compressed-tensors to itself: each tensor of the files as it was, and as the way through codes has it."""
    folder, _ = test_compressed_tensors.checkpoint(tmp_path / "q", *test_compressed_tensors.CASES[case])
    convert(folder, tmp_path / "a", "compressed-tensors")
    assert bool(whole) is (case not in ("pack int4", "pack int3"))  # zero points are made of a whole weight
    monkeypatch.setattr(OpenedSource, "filed", lambda *asked: None)
    convert(folder, tmp_path / "b", "compressed-tensors")
    assert whole and (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


@pytest.mark.parametrize("line", ["q6_k", "q5_0", "q4_k", "tq1_0"])
def test_blocks_of_a_gguf_are_copied(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q and k, which llama.cpp has in another order, too; ternary digits are spelled anew."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 96}
    made: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    made.save_pretrained(tmp_path / "float")
    nybble.quantize(str(tmp_path / "float"), "rtn", weights=line, out=tmp_path / "q", target="gguf")
    read: list[str] = []
    decoded = GgufSource.read_quantized

    def noted(self: GgufSource, name: str) -> Any:
        read.append(name)
        return decoded(self, name)

    monkeypatch.setattr(GgufSource, "read_quantized", noted)
    export(tmp_path / "q", tmp_path / "a", "gguf")
    (file,) = (tmp_path / "a").glob("*.gguf")
    convert(file, tmp_path / "b", "gguf")
    quick = [name for name in read if "_proj" in name]
    monkeypatch.setattr(OpenedSource, "blocks", lambda *asked: None)
    convert(file, tmp_path / "c", "gguf")
    assert bool(quick) is (line == "tq1_0") and any("_proj" in name for name in read)
    (one,), (other,) = ((tmp_path / place).glob("*.gguf") for place in "bc")
    assert one.read_bytes() == other.read_bytes()
    tensors = {t.name: t.data for t in GGUFReader(str(file)).tensors}
    assert all(np.array_equal(t.data, tensors[t.name]) for t in GGUFReader(str(one)).tensors)


@pytest.mark.parametrize("target", ["compressed-tensors", "modelopt"])
def test_a_conversion_makes_one_skeleton(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that names are matched with is the target's too; layers stand in a twin of it."""
    folder, _ = test_modelopt.checkpoint(tmp_path / "q", "NVFP4")
    calls, make = [], skeleton.meta_model

    def noted(config: Any, dtype: torch.dtype, stored: Any) -> Any:
        calls.append(dtype)
        return make(config, dtype, stored)

    for place in ("models.sources.folder", "export._source", "models.build.skeleton"):
        monkeypatch.setattr(f"nybble.{place}.meta_model", noted)
    convert(folder, tmp_path / "there", target, round="auto")
    assert len(calls) == 1


def test_a_twin_has_modules_of_its_own() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 8}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = skeleton.meta_model(config, torch.bfloat16, ["x"])
    twin: Any = skeleton.twin_of(model)
    before = dict(model.named_modules())
    assert list(before) == list(dict(twin.named_modules()))
    assert not {id(module) for module in before.values()} & {id(module) for module in twin.modules()}
    assert (
        twin.lm_head.weight is twin.model.embed_tokens.weight and twin.get_input_embeddings() is twin.model.embed_tokens
    )
    twin.model.layers[0].mlp.up_proj = torch.nn.Identity()
    del twin.model.norm.weight
    skeleton.fill_buffers_(twin)
    assert dict(model.named_modules()) == before and model.model.norm.weight.is_meta
    assert model.model.rotary_emb.inv_freq.is_meta and not twin.model.rotary_emb.inv_freq.is_meta
