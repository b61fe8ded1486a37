"""Mutated model files: only nybble's own errors come out, nothing runs, and no claim of a header becomes memory.

2,400 seeded mutations of config.json, safetensors headers and GGUF headers: flipped bytes, cut files, huge and negative
numbers, swapped types, deep nesting. Each goes through opening, the config, the names and loading one tensor.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from nybble.core.errors import NybbleError
from nybble.models.sources.open import open_source

MUTATIONS = 800
ODD: list[Any] = [
    0, 1, -1, 2, 255, 2**31, 2**32 - 1, 2**53, 2**60, 2**63, 2**64 - 1, 10**30, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), True, None, "", "x" * 1000, "../../etc/passwd", [], [[]], {}, {"a": {"b": []}}, [2**60] * 3,
    "F8_E4M3", "gpt2", "mixtral", "\ud800",
]  # fmt: skip
MAX_GROWTH = 512 << 20  # bytes of peak memory that all the mutations together may add; the files have under 1 MB


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        return LlamaForCausalLM(config)


@pytest.fixture(autouse=True)
def nothing_runs_and_memory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("code from a model was about to be fetched or run")

    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", forbidden)
    monkeypatch.setattr("torch.load", forbidden)
    before = peak_bytes()
    yield
    assert peak_bytes() - before < MAX_GROWTH


def use(spec: Path) -> bool:
    """Open and read; True if all went well, False if nybble refused. Anything else is the bug looked for."""
    try:
        source = open_source(str(spec))
        assert source.config.model_type
        names = source.tensor_names()
        loaded = source.load(names[:1])
        assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.values())
        source.skeleton(torch.float32)
    except NybbleError as error:
        assert len(str(error)) < 5000
        return False
    return True


def mutated_bytes(data: bytes, rng: random.Random, header: int) -> bytes:
    """Flip, overwrite, insert, delete or cut, within the first ``header`` bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(min(header, len(changed)))
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 8] = struct.pack("<Q", rng.choice((2**60, 2**64 - 1, 2**63, 2**32, 0, 1, len(data))))
            case 2:
                changed[at : at + 4] = struct.pack("<I", rng.choice((0, 8, 9, 12, 13, 2**31, 2**32 - 1)))
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                del changed[max(at, 1) : at + rng.randrange(2, 9)]
            case 5:
                changed = changed[: max(at, 1)]
    return bytes(changed)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, item in items for p in [(*path, key), *places(item, (*path, key))]]


def mutated_json(value: Any, rng: random.Random) -> bytes:
    """Replace, remove, rename or nest a few values, or damage the text."""
    changed = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 4))):
        *way, last = rng.choice(places(changed))
        parent = changed
        for key in way:
            parent = parent[key]
        match rng.randrange(8):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(("auto_map", "quantization_config", "head_dim", "rope_scaling", "x"))] = parent[last]
            case 2:
                parent[last] = [parent[last]] * 3
            case _:
                parent[last] = copy.deepcopy(rng.choice(ODD))
        if not places(changed):
            break
    text = json.dumps(changed).encode()
    return mutated_bytes(text, rng, len(text)) if rng.random() < 0.2 else text


def test_config_json(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C"}, "id2label": {"0": "a"}, "head_dim": 8}
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    outcomes = []
    for seed in range(MUTATIONS):
        (tmp_path / "config.json").write_bytes(mutated_json(config, random.Random(seed)))
        outcomes.append(use(tmp_path))
    assert 50 < sum(outcomes) < MUTATIONS - 50  # some are harmless, many are not: the mutations reach the checks


def test_safetensors_headers(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    outcomes = []
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        if seed % 2:
            path.write_bytes(mutated_bytes(data, rng, 8 + length))
        else:
            text = mutated_json(header, rng)
            path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        outcomes.append(use(tmp_path))
    assert 0 < sum(outcomes) < MUTATIONS - 50
    path.write_bytes(data)
    assert use(tmp_path) and len(load_file(path)) == 11


def write_gguf(path: Path, model: Any) -> int:
    """A small llama as GGUF; returns the length of the header."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_token_list([chr(97 + i % 26) * (i // 26 + 1) for i in range(32)])
    writer.add_token_types([1] * 32)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "q_proj": "attn_q", "k_proj": "attn_k",
        "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
        "down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        short = names.get(stem) or names.get(stem.rpartition(".")[2])
        if short is not None:
            block = "blk.0." if ".layers." in name else ""
            writer.add_tensor(f"{block}{short}.weight", tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor_bytes: list[int] = [-(-t.nbytes // 32) * 32 for n, t in model.state_dict().items() if "head" not in n]
    return path.stat().st_size - sum(tensor_bytes)


def test_gguf_headers(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    header = write_gguf(path, model)
    data = path.read_bytes()
    assert use(path)
    outcomes = []
    for seed in range(MUTATIONS):
        path.write_bytes(mutated_bytes(data, random.Random(seed), header))
        outcomes.append(use(path))
    assert 10 < sum(outcomes) < MUTATIONS - 50


def test_claims_far_beyond_the_file(model: Any, tmp_path: Path) -> None:
    """2**60 tensors, strings, dimensions, array items: refused by comparing with the file's size."""
    path = tmp_path / "model.gguf"
    header = write_gguf(path, model)
    data = path.read_bytes()
    refused = 0
    for at in range(4, header - 8):
        changed = bytearray(data)
        changed[at : at + 8] = struct.pack("<Q", 2**60)
        path.write_bytes(changed)
        refused += not use(path)
    assert refused > header // 3
