"""What transformers and accelerate do with a quantized model: batches with padding, device maps, shards, pipelines."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.tiny import given, logits, save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import nybble
from nybble.core.errors import DeviceError, UsageError
from nybble.nn.activation import measured_over_tokens
from nybble.nn.kv_cache import make_cache
from nybble.nn.kv_model import recorded_kv
from nybble.pipelines.request import build_recipe

AUTO: Any = AutoModelForCausalLM
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39], [44])
NEW = 8
SCHEMES = {
    "token": {"weights": "int4 group=16", "activations": "int8 token", "kv": "int4 group=8 symmetric=false"},
    "group": {"weights": "mxfp4 group=16", "activations": "mxfp4 group=16", "kv": "int4 token residual=4"},
    "products": {"weights": "int8 channel", "activations": "int8 token", "matmuls": "int8 token"},
    "static": {"weights": "int8 channel", "activations": "int8 tensor static", "kv": "int8 token"},
}
PLACES = {
    "model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip
SHARED = {"tensor": {"activations": "int8 tensor"}, "outer": {"activations": "nvfp4"}}


def padded(prompts: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [prompts, longest], padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids, mask


def generated(model: Any, prompts: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The new tokens [prompts, NEW], and what the quantized cache holds at the end, by name."""
    ids, mask = padded(prompts)
    kv = recorded_kv(model)
    cache: Any = None if kv is None else make_cache(model.config, kv)  # type: ignore[arg-type]
    options = {} if cache is None else given(model, cache)
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0,
            suppress_tokens=[0], **options,
        )  # fmt: skip
    return made[:, ids.shape[1] :], {} if cache is None else cache.tensors()


def quantized(family: str, scheme: dict[str, str]) -> Any:
    """In float32, so that a batch's products come to the same numbers; padding is a hundred times as loud as text."""
    model = tiny_model(family, dtype=torch.float32)
    data = torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    nybble.quantize(model, build_recipe("rtn", **scheme), data if "static" in str(scheme) else "builtin")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] *= 100
    return model


@pytest.mark.parametrize(
    ("family", "scheme"),
    [*(("llama", name) for name in SCHEMES), *((family, "token") for family in ("gemma2", "gpt2", "bloom", "falcon"))],
)
def test_a_batch_comes_to_what_each_prompt_comes_to(family: str, scheme: str) -> None:
    """Greedy; with rotary, learned and linear positions, and windows. The same tokens are cached by the same scales."""
    model = quantized(family, SCHEMES[scheme])
    assert not measured_over_tokens(model)
    together, cached = generated(model, PROMPTS)
    assert len({tuple(row) for row in together.tolist()}) > 1
    for row, prompt in enumerate(PROMPTS):
        alone, own = generated(model, [prompt])
        assert torch.equal(together[row], alone[0]), prompt
        for name, tensor in own.items():
            if name.endswith("scale"):
                there = cached[name][row, :, cached[name].shape[2] - tensor.shape[2] :]
                torch.testing.assert_close(there, tensor[0], rtol=1e-2, atol=0)  # float16 has 11 bits


@pytest.mark.parametrize("scheme", SHARED)
def test_what_a_batch_shares_is_named(scheme: str) -> None:
    """A scale that is measured on all tokens depends on padding; the layers that do so can be asked for."""
    model = quantized("llama", {"weights": "int8 channel", **SHARED[scheme]})
    found = measured_over_tokens(model)
    assert len(found) == 14 and all(name.endswith("inputs") for name in found)
    together, _ = generated(model, PROMPTS)
    assert any(not torch.equal(together[row], generated(model, [p])[0][0]) for row, p in enumerate(PROMPTS))


@pytest.fixture(scope="module", params=["", "int8 channel"], ids=["float head", "quantized head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of nybble's own, whose head and embedding are tied."""
    tmp = tmp_path_factory.mktemp("transformers")
    model, tokenizer = nybble.load(save_tiny(tmp / "float"))
    assert tokenizer is not None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model.generation_config.max_new_tokens = 5
    scheme = {
        "weights": "nvfp4",
        "activations": "int8 token",
        **({"embeddings": request.param} if request.param else {}),
    }
    nybble.quantize(model, build_recipe("rtn", **scheme))
    return nybble.save(model, tmp / "out", tokenizer)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_shards_come_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    """Written by transformers in pieces, read by both; a tied weight is stored once."""
    AUTO.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    before, after = stored(folder), stored(tmp_path / "shards")
    assert before.keys() == after.keys() and not any(name.startswith("lm_head.") for name in after)
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    want = logits(nybble.load(folder)[0])
    for options in ({}, {"device_map": "auto"}, {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}):
        model = AUTO.from_pretrained(tmp_path / "shards", **options)
        assert torch.equal(logits(model), want)
    assert torch.equal(logits(nybble.load(tmp_path / "shards")[0]), want)


def test_a_pipeline_of_a_folder(folder: Path) -> None:
    """Tokenizer, chat template and generation config are there, in the folder that transformers is given."""
    make: Any = transformers.pipeline
    for options in ({}, {"device_map": "auto"}):
        pipe = make("text-generation", model=str(folder), **options)
        text = pipe("ba be bi", do_sample=False)[0]["generated_text"]
        reply = pipe([{"role": "user", "content": "ba be bi"}], do_sample=False)[0]["generated_text"][-1]
        assert reply["role"] == "assistant"
        ids = pipe.tokenizer("ba be bi", return_tensors="pt")["input_ids"]
        made = nybble.load(folder)[0].generate(ids, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        assert tiny_tokenizer().decode(made[0], skip_special_tokens=True) == text and 3 < made.shape[1] <= 8


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    ("device_map", "most"),
    [("auto", None), ("auto", 0.5), ("sequential", 0.5), ({"": "disk"}, None), (PLACES, None)],
)
def test_a_map_of_nybbles_own_loader(folder: Path, tmp_path: Path, device_map: Any, most: float | None) -> None:
    """The same logits twice (what was brought has gone again), and the same tensors written; no stale file is read."""
    (tmp_path / "index.json").write_text("{}")  # of another model that was there
    size = sum(tensor.nbytes for tensor in stored(folder).values())
    room = None if most is None else {"cpu": int(most * size)}
    model, tokenizer = nybble.load(folder, device_map=device_map, max_memory=room, offload_folder=tmp_path)
    assert tokenizer is not None
    want = logits(nybble.load(folder)[0])
    away = "disk" in str(device_map) or most is not None
    for _ in range(2):
        assert torch.equal(logits(model), want)
        assert any(buffer.device.type == "meta" for buffer in model.buffers()) == away
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(nybble.load(tmp_path / "again")[0]), want)
    if away:
        with pytest.raises(UsageError, match=r"offloaded \(device_map\); model\.save_pretrained"):
            nybble.save(model, tmp_path / "out", tokenizer)
    del model
    gc.collect()
    assert not [*tmp_path.glob("nybble-*")]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device_map": {"model.norm": "cpu"}}, UsageError, r"'model\.norm': 'cpu'.*model\.layers"),
        ({"device_map": "nowhere"}, DeviceError, "'nowhere'"),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, UsageError, "lots"),
        ({"device_map": "auto", "dense": True}, UsageError, "dense=True"),
        ({"device_map": "auto", "device": "cuda"}, UsageError, "device='cuda'"),
        ({"max_memory": {"cpu": 1}}, UsageError, "give one, or leave them out"),
    ],
)
def test_maps_that_lead_nowhere(folder: Path, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        nybble.load(folder, **options)
