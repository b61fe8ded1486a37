"""GGUF files that nybble writes: read back by nybble, the gguf package and transformers, and run by llama.cpp."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tests.parts.models.test_gguf import MODEL_TYPES, byte_tokens

from nybble.checkpoint.account import inspect
from nybble.core.errors import FileError, ModelError, UsageError
from nybble.models.gguf.metadata import arch_for, config_pairs
from nybble.models.gguf.mixes import MIXES, fitting, mix, type_for
from nybble.models.gguf.of_source import weights_of
from nybble.models.gguf.rope import lengths_differ, rope_tensors
from nybble.models.gguf.vocabulary import tokenizer_pairs
from nybble.models.gguf.write import Weight, write_gguf
from nybble.models.sources.gguf_header import read_gguf_header
from nybble.models.sources.gguf_names import ARCHS, config_dict
from nybble.models.sources.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from nybble.models.sources.open import open_source
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

WIDE = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 264, "bos_token_id": 1, "eos_token_id": 257}


def weights_in(model: Any, line: str = "") -> dict[str, Weight]:
    """A model's parameters, matrices quantized by a line if one is given."""
    found: dict[str, Weight] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value: Any = tensor
        stored: QTensor | None = None
        if line and tensor.ndim == 2:
            value = Quantizer(line).quantize(tensor)
            stored = Quantizer(line).quantize(tensor.to("meta"))
        found[name] = Weight(
            shape=tuple(tensor.shape), dtype=tensor.dtype, read=partial(lambda v: v, value), stored=stored
        )
    return found


def tokenizer_of(pre: str = "gpt-2", size: int = 264) -> Any:
    tokens = [*byte_tokens(), "he", "<|end|>"] + [f"<|{i}|>" for i in range(size - 258)]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e"], "tokenizer.ggml.token_type": [1] * 257 + [3] * (size - 257),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }  # fmt: skip
    return build_tokenizer(metadata, Path("x.gguf"))


@pytest.fixture
def tiny(make_model: Any) -> Callable[..., Any]:
    def make(arch: str, **changes: Any) -> Any:
        more = {"num_hidden_layers": 6, "layer_types": None} if arch == "gemma3" else {}
        return make_model(MODEL_TYPES.get(arch, arch), **{**WIDE, **more, **changes})

    return make


@pytest.mark.parametrize("arch", [*sorted(ARCHS), "mistral"])
@torch.no_grad()
def test_float_models_come_back_exactly(arch: str, tiny: Any, tmp_path: Path, input_ids: torch.Tensor) -> None:
    model = tiny(arch, **({"sliding_window": None} if arch == "mistral" else {}))
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path, model.config, weights_in(model), name="tiny")
    assert written.nbytes == path.stat().st_size and not written.notes and set(written.types.values()) == {"F32"}
    ours = open_source(str(path)).model(torch.float32)
    for name, tensor in model.state_dict().items():
        if arch.startswith("gemma") and name.endswith("norm.weight"):  # the file has them plus one
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=2.0**-23)
        else:
            assert torch.equal(ours.state_dict()[name], tensor), name
    torch.testing.assert_close(ours(input_ids=input_ids).logits, model(input_ids=input_ids).logits)


@pytest.mark.parametrize("line", ["q8_0", "q4_k", "q6_k", "iq4_xs", "mxfp4", "nvfp4", "q4_0", "tq2_0"])
@torch.no_grad()
def test_codes_are_written_as_they_are(line: str, tiny: Any, tmp_path: Path) -> None:
    """Rows of q and k too, which llama.cpp has in another order; the gguf package reads the same values."""
    model = tiny("llama", tie_word_embeddings=False)
    weights, path = weights_in(model, line), tmp_path / "tiny.gguf"
    write_gguf(path, model.config, weights)
    source, again = open_source(str(path)), tmp_path / "again.gguf"
    loaded = source.load(list(weights))
    for name, weight in weights.items():
        value: Any = weight.read()
        assert torch.equal(loaded[name], value.dequantize() if isinstance(value, QTensor) else value), name
    theirs = {tensor.name: tensor for tensor in GGUFReader(str(path)).tensors}
    found: Any = weights["model.layers.1.mlp.up_proj.weight"].read()
    other = np.array(dequantize(theirs["blk.1.ffn_up.weight"].data, theirs["blk.1.ffn_up.weight"].tensor_type))
    if line == "nvfp4":
        other = other * np.array(theirs["blk.1.ffn_up.scale"].data)
        np.testing.assert_allclose(other, found.dequantize().numpy(), rtol=4e-7)
    else:
        assert np.array_equal(other, found.dequantize().numpy())
    write_gguf(again, source.config, weights_of(source))  # from GGUF to GGUF nothing is rounded
    a, b = read_gguf_header(path), read_gguf_header(again)
    for name, entry in a.tensors.items():
        there = b.tensors[name]
        old, new = path.read_bytes(), again.read_bytes()
        assert old[entry.start : entry.start + entry.nbytes] == new[there.start : there.start + there.nbytes]


@torch.no_grad()
def test_a_mixture(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=8, intermediate_size=320)
    energies = {"model.layers.0.mlp.up_proj.weight": torch.ones(256).index_fill_(0, torch.arange(0, 256, 32), 1e4)}
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path, model.config, weights_in(model), file_type="q4_k_m", energies=energies)
    assert written.types["blk.0.attn_v.weight"] == written.types["token_embd.weight"] == "Q6_K"
    assert written.types["blk.1.attn_v.weight"] == written.types["blk.0.attn_q.weight"] == "Q4_K"
    assert written.types["blk.0.ffn_down.weight"] == "Q8_0" and written.types["blk.1.ffn_down.weight"] == "Q5_0"
    assert written.types["blk.0.attn_norm.weight"] == "F32"
    assert any(
        n.startswith("rows that Q4_K's blocks don't divide are Q5_0: blk.1.ffn_down.weight") for n in written.notes
    )
    source = open_source(str(path))
    name = "model.layers.0.mlp.up_proj.weight"
    weight, got = model.state_dict()[name], source.load([name])[name]
    assert torch.equal(
        got, Quantizer("q4_k").fake_quantize(weight, Quantizer("q4_k").fit(weight, energies[name][None]))
    )
    assert read_gguf_header(path).metadata["general.file_type"] == 15


def test_the_mixtures_of_llama_cpp() -> None:
    """By the rules of its source: use_more_bits is 0-3, every third from 6 on, 28-31 of 32 blocks."""
    chosen = [i for i in range(32) if type_for(mix("Q4_K_M"), f"blk.{i}.ffn_down.weight", 32, False) == "Q6_K"]
    assert chosen == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert type_for(mix("q4_k_s"), "blk.3.attn_v.weight", 32, False) == "Q5_K"
    assert type_for(mix("q4_k_s"), "blk.4.attn_v.weight", 32, False) == "Q4_K"
    assert type_for(mix("q8_0"), "output.weight", 32, False) == "Q8_0"
    assert [fitting(kind, 576) for kind in ("Q4_K", "Q5_K", "Q6_K", "Q3_K", "NVFP4", "TQ1_0")] == [
        "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "NVFP4", "Q4_0",
    ]  # fmt: skip
    assert fitting("Q4_K", 100) == "F16"
    with pytest.raises(UsageError, match=r"unknown GGUF type 'q4_k_x'\. Did you mean"):
        mix("q4_k_x")


@pytest.mark.parametrize(
    "pre", sorted({next(n for n, p in PRE_TOKENIZERS.items() if p == q) for q in PRE_TOKENIZERS.values()})
)
def test_byte_level_tokenizers(pre: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(pre)
    pairs = tokenizer_pairs(tokenizer, 270)
    assert PRE_TOKENIZERS[pairs["tokenizer.ggml.pre"]].patterns == PRE_TOKENIZERS[pre].patterns
    assert pairs["tokenizer.ggml.token_type"][256:259] == [1, 3, 3] and pairs["tokenizer.ggml.token_type"][269] == 5
    again = build_tokenizer(pairs, Path("x.gguf"))
    text = "He's the 1234th,  isn't\n\n he?<|end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template and again.eos_token == tokenizer.eos_token


def spm() -> Any:
    """A sentencepiece-like tokenizer as transformers converts Llama 2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    backend.train_from_iterator(
        ["the cat sat on the mat and the hat of that cat is there", "a bat that sat"] * 4, trainer
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    said = json.loads(backend.to_str())
    said["added_tokens"] = [token for token in said["added_tokens"] if token["id"] < 3]  # bytes are ordinary tokens
    made = Tokenizer.from_str(json.dumps(said))
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_sentencepiece_tokenizer() -> None:
    tokenizer = spm()
    pairs = tokenizer_pairs(tokenizer, 430)
    tokens, scores = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.scores"]
    assert pairs["tokenizer.ggml.model"] == "llama" and pairs["tokenizer.ggml.add_space_prefix"] is True
    assert pairs["tokenizer.ggml.token_type"][tokens.index("<0x0A>")] == 6
    assert segmented("the cat sat on a hat", tokens, scores) == tokenizer("the cat sat on a hat")["input_ids"]


def segmented(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """As llama.cpp's llm_tokenizer_spm: the neighbours whose joint token has the highest score, leftmost first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        pairs = [(scores[tokens.index(token)], -i) for i, token in enumerate(joined) if token in tokens]
        if not pairs:
            return [tokens.index(piece) for piece in pieces]
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_tokenizers_that_cannot_be_written() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    with pytest.raises(ModelError, match="a tokenizer of type WordLevel can't be written as GGUF"):
        tokenizer_pairs(fast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))), 9)
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="no rules for a pre-tokenizer of type Whitespace"):
        tokenizer_pairs(fast(tokenizer_object=backend), 9)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ModelError, match="a tokenizer without merges"):
        tokenizer_pairs(fast(tokenizer_object=backend), 9)
    with pytest.raises(ModelError, match="the tokenizer has the token 263, and the model's embedding 200 rows"):
        tokenizer_pairs(tokenizer_of(), 200)


@torch.no_grad()
def test_what_is_refused_leaves_nothing(tiny: Any, make_model: Any, tmp_path: Path) -> None:
    path, model = tmp_path / "tiny.gguf", tiny("llama")
    with pytest.raises(ModelError, match=r"a model of type 'gpt2' can't be written as GGUF; nybble writes .*qwen3"):
        arch_for(make_model("gpt2").config)
    with pytest.raises(UsageError, match=r"no GGUF type holds 'int4_full group=16 scale=float16.*gguf:q4_k_m"):
        write_gguf(path, model.config, weights_in(model, "int4 group=16 symmetric=false"))
    written = write_gguf(path, model.config, weights_in(model, "int4 group=16"), file_type="q8_0")
    assert any(note.startswith("rounded again, 'int4 group=16 scale=float16' to Q8_0") for note in written.notes)
    path.unlink()
    bad = weights_in(model) | {"model.norm.weight": Weight(shape=(256,), read=lambda: torch.full((256,), torch.nan))}
    with pytest.raises(ModelError, match=r"model.norm.weight holds NaN or Inf"):
        write_gguf(path, model.config, bad)
    with pytest.raises(ModelError, match=r"model.extra.weight has no place in a GGUF of architecture llama"):
        write_gguf(
            path,
            model.config,
            weights_in(model) | {"model.extra.weight": Weight(shape=(2,), read=lambda: torch.ones(2))},
        )
    with pytest.raises(FileError, match="there"):
        write_gguf(tmp_path / "there" / "x.gguf", model.config, weights_in(model))
    assert list(tmp_path.iterdir()) == []


def test_stretched_frequencies(make_model: Any) -> None:
    """Llama 3's, against transformers' own function."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = make_model("llama", rope_parameters=rope, head_dim=64).config
    found = rope_tensors(config)["rope_freqs.weight"]
    plain = 1 / (500000.0 ** (torch.arange(0, 64, 2).float() / 64))
    theirs = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    torch.testing.assert_close(plain / torch.from_numpy(found), theirs, rtol=1e-5, atol=0)


YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
    "long_factor": [1.0 + 0.7 * i for i in range(16)], "short_factor": [1.0 + 0.05 * i for i in range(16)],
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
NARROW = {"num_attention_heads": 8, "head_dim": 32, "max_position_embeddings": 512}
ROPES = {
    "linear": ("llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": ("llama", LLAMA3),
    "yarn": ("llama", YARN),
    "yarn of qwen": ("qwen3", YARN),
    "its attention factor": ("llama", YARN | {"attention_factor": 0.8}),
    "its two scales": ("qwen2", YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
    "another ramp": ("llama", YARN | {"beta_fast": 8.0, "beta_slow": 0.5}),
    "a ramp between dimensions": ("llama", YARN | {"truncate": False}),
    "long": ("llama", LONG),
    "short": ("llama", LONG | {"original_max_position_embeddings": 1024, "factor": 2.0}),
}


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_ropes_are_read_as_they_were_written(name: str, tiny: Any, tmp_path: Path) -> None:
    """Logits are those of transformers' own model; Llama 3's factors become its parameters again."""
    family, rope = ROPES[name]
    model, path = tiny(family, rope_parameters=rope, **NARROW), tmp_path / "tiny.gguf"
    write_gguf(path, model.config, weights_in(model))
    source = open_source(str(path))
    again = source.model(torch.float32)
    for length in (40, 90):  # LongRoPE takes other factors behind 64 tokens
        ids = torch.arange(length)[None]
        ours, theirs = again(ids).logits, model(ids).logits
        # Where factors are given, each frequency is rounded once more to float32, and turns up to 90 times.
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    if name in ("linear", "llama3", "yarn"):
        assert torch.equal(ours, theirs)
        assert {**source.config.rope_parameters, **rope} == source.config.rope_parameters
    tensors = {tensor.name: tensor.n_bytes for tensor in GGUFReader(path).tensors if "rope_" in tensor.name}
    assert inspect(path)["bytes"].get("tables", 0) == sum(tensors.values())


@pytest.mark.parametrize(
    ("pairs", "factors", "message"),
    [
        ({}, {"rope_freqs": [1.0] * 15}, r"rope_freqs.weight is \[15\]; a head has 16 pairs of channels"),
        ({}, {"rope_freqs": [1.0] * 15 + [0.0]}, r"rope_freqs.weight divides frequencies, and holds numbers that are"),
        (
            {"type": "linear", "factor": 2.0},
            {"rope_freqs": [2.0] * 16},
            "rope_freqs.weight beside rope scaling 'linear'",
        ),
        ({"type": "linear", "factor": 2.0, "attn_factor": 2.0}, {}, "attn_factor beside rope scaling 'linear'"),
        ({}, {"rope_factors_long": [2.0] * 16}, "rope_factors_long.weight beside rope scaling 'default'"),
        ({"type": "longrope"}, {"rope_factors_long": [2.0] * 16}, "the file lacks rope_factors_short.weight"),
        (
            {"type": "longrope"},
            dict.fromkeys(("rope_factors_long", "rope_factors_short", "rope_freqs"), [2.0] * 16),
            "the file has rope_freqs.weight too",
        ),
        (
            {"type": "longrope"},
            dict.fromkeys(("rope_factors_long", "rope_factors_short"), [2.0] * 16),
            "original_context_length is None; one number is needed",
        ),
    ],
)
def test_ropes_that_contradict_themselves(pairs: dict[str, Any], factors: dict[str, Any], message: str) -> None:
    metadata: dict[str, Any] = {f"llama.{key}": 64 for key in ARCHS["llama"].keys}
    metadata |= {"llama.attention.key_length": 32} | {
        f"llama.rope.scaling.{key}": value for key, value in pairs.items()
    }
    found = {f"{name}.weight": np.array(values, np.float32) for name, values in factors.items()}
    with pytest.raises(ModelError, match=f"^x.gguf: .*{message}"):
        config_dict(metadata, {"token_embd.weight": (7, 64)}, "llama", ARCHS["llama"], "x.gguf", found)


@torch.no_grad()
def test_a_factor_of_attention_alone(tiny: Any, tmp_path: Path) -> None:
    """llama.cpp multiplies cosine and sine with it under every rope."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512, "attention_factor": 1.25,
        "long_factor": [1.0] * 16, "short_factor": [1.0] * 16,
    }  # fmt: skip
    model, path = tiny("llama", rope_parameters=rope, **NARROW), tmp_path / "tiny.gguf"
    plain = copy.deepcopy(model.config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    weights = weights_in(model)
    write_gguf(path, plain, weights)
    writer = gguf.GGUFWriter(tmp_path / "scaled.gguf", "llama")
    reader = GGUFReader(path)
    for field in reader.fields.values():
        if field.name.startswith("llama."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_key_value("llama.rope.scaling.attn_factor", 1.25, gguf.GGUFValueType.FLOAT32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.arange(90)[None]
    found = open_source(str(tmp_path / "scaled.gguf")).model(torch.float32)
    torch.testing.assert_close(found(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("family", "rope", "message"),
    [
        ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "scaling 'dynamic' can't be written as"),
        ("qwen2", YARN | {"truncate": False}, "qwen2 rotates by no other ramp of YaRN than that of beta_fast=32"),
        ("qwen2", LONG, "GGUF's qwen2 has no rope scaling of type longrope"),
        ("llama", LONG | {"long_factor": [1.0]}, "LongRoPE's long_factor has 1 numbers; a head has 16 pairs"),
    ],
)
def test_ropes_that_cannot_be_written(family: str, rope: dict[str, Any], message: str, tiny: Any) -> None:
    config = tiny(family, **NARROW).config
    config.rope_parameters = rope
    with pytest.raises(ModelError, match=message):
        config_pairs(config, *arch_for(config))


def test_what_a_file_says_of_ropes(tiny: Any) -> None:
    """YaRN's keys as llama.cpp's converter has them; the factor of attention where llama.cpp reads it."""
    for name in ("yarn", "its two scales", "long"):
        family, rope = ROPES[name]
        config = tiny(family, rope_parameters=rope, **NARROW).config
        said = config_pairs(config, *arch_for(config))
        scaling = {k.partition(".scaling.")[2]: v for k, v in said.items() if ".scaling." in k}
        assert ("LongRoPE" in lengths_differ(config)) == (name == "long")
        if name == "long":
            factor = (1 + np.log(8) / np.log(64)) ** 0.5
            wanted = {"type": "longrope", "original_context_length": 64, "attn_factor": pytest.approx(factor)}
        else:
            wanted = {"type": "yarn", "factor": 8.0, "original_context_length": 64, "yarn_beta_fast": 32.0}
            wanted["yarn_beta_slow"] = 1.0
        if "scales" in name:  # 0.1 ln 8 + 1 of it llama.cpp multiplies itself
            wanted["attn_factor"] = pytest.approx(1 / (0.05 * np.log(8) + 1))
        assert scaling == wanted


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp itself: pip install xllamacpp")
@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_llama_cpp_rotates_the_same(name: str, tiny: Any, tmp_path: Path) -> None:
    """Logits of transformers over a text longer than what the model was made for, and the same greedy text."""
    from benchmarks.llama_cpp import LlamaCpp

    family, rope = ROPES[name]
    model, path = tiny(family, rope_parameters=rope, **NARROW), tmp_path / "tiny.gguf"
    write_gguf(path, model.config, weights_in(model), tokenizer=tokenizer_of())
    ids, theirs = [1 + (7 * i) % 250 for i in range(200)], LlamaCpp(path)
    (logits,) = theirs.logits(iter([ids]), 264)
    text, _ = theirs.greedy(ids, 16, 264)
    theirs.close()
    ours = model(torch.tensor([ids])).logits[0]
    assert float((torch.from_numpy(logits) - ours).norm() / ours.norm()) < 1e-4
    assert model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, 200:].tolist() == text
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    plainly = type(model)(model.config).eval()
    plainly.load_state_dict(model.state_dict())
    assert float((plainly(torch.tensor([ids])).logits[0] - ours).norm() / ours.norm()) > 1e-2


def test_damaged_files_give_our_errors(tmp_path: Path) -> None:
    """benchmarks/gguf_fuzz.py runs ten thousand; whatever else is raised fails the test."""
    from benchmarks.gguf_fuzz import damaged, trial
    from benchmarks.gguf_fuzz import tiny as whole_file

    path = tmp_path / "tiny.gguf"
    whole_file(path)
    data = path.read_bytes()
    assert trial(path) == "read"
    outcomes = set()
    for seed in range(60):
        path.write_bytes(damaged(data, data.index(b"output_norm.weight") + 60, random.Random(seed)))
        outcomes.add(trial(path))
    assert {"read", "FileError"} <= outcomes <= {"read", "FileError", "ModelError"}


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp itself: pip install xllamacpp")
@torch.no_grad()
def test_llama_cpp_computes_the_same(tiny: Any, tmp_path: Path) -> None:
    """Where it rounds no inputs, the logits; where it does, each product, given the inputs that it had.

    A product's float32 sums of 256 terms differ by some 2^-24 times 16; a code that falls on the other side of a tie
    (one in a million) moves one of 256 inputs by a step, 2.5 / 127 deviations: 1e-3 of a row. Not rounding them is 12
    times that, and is seen.
    """
    from benchmarks.gguf_runs import products
    from benchmarks.llama_cpp import LlamaCpp

    ids = list(range(20, 60))
    for line in ("", "q8_0", "q4_k"):
        model, path = tiny("llama"), tmp_path / f"{line}.gguf"
        weights = weights_in(model, line)
        write_gguf(path, model.config, weights, tokenizer=tokenizer_of())
        theirs = LlamaCpp(path)
        assert theirs.ids("hello 12") == tokenizer_of()("hello 12")["input_ids"]
        if line:
            found = products(path, theirs.products(ids, 264))
            assert found["count"] == 15 and found["rounded"]["median"] < 1e-5
            assert found["rounded"]["largest"] < 1e-3 < found["not"]["median"]
            path = tmp_path / "float.gguf"  # its values, as float weights
            weights = {n: replace(w, read=partial(plain, w), stored=None) for n, w in weights.items()}
            write_gguf(path, model.config, weights, tokenizer=tokenizer_of())
            theirs.close()
            theirs = LlamaCpp(path)
        (logits,) = theirs.logits(iter([ids]), 264)
        theirs.close()
        ours = open_source(str(path)).model(torch.float32)(torch.tensor([ids])).logits[0]
        assert float((torch.from_numpy(logits) - ours).norm() / ours.norm()) < 1e-5, line


def plain(weight: Weight) -> torch.Tensor:
    value = weight.read()
    return value.dequantize() if isinstance(value, QTensor) else value


@pytest.mark.skipif(find_spec("ik_llama_cpp") is None, reason="llama-quantize: pip install ik-llama-cpp-python")
@pytest.mark.parametrize(("blocks", "tied"), [(32, False), (12, True)])
def test_llama_quantize_has_the_same_mixtures(blocks: int, tied: bool, tiny: Any, tmp_path: Path) -> None:
    """Every tensor of every mixture. The fork's own iq4 mixtures are other ones than llama.cpp's, so not compared."""
    spec = find_spec("ik_llama_cpp")
    assert spec is not None and spec.submodule_search_locations
    program = Path(spec.submodule_search_locations[0]) / "bin" / "llama-quantize"
    model, path = tiny("llama", num_hidden_layers=blocks, tie_word_embeddings=tied), tmp_path / "float.gguf"
    write_gguf(path, model.config, weights_in(model), tokenizer=tokenizer_of())
    for name in (*MIXES, "Q4_0", "Q4_1", "Q5_0", "Q6_K", "Q8_0"):
        said = subprocess.run(
            [str(program), "--dry-run", str(path), str(tmp_path / "no.gguf"), name],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        theirs = dict(re.findall(r"\]\s+(\S+\.weight) - \[.*converting to (\w+)", said.stdout + said.stderr))
        assert len(theirs) == 7 * blocks + (1 if tied else 2)
        for at, kind in theirs.items():
            assert type_for(mix(name), at, blocks, tied).lower() == kind.lower(), (name, at)
