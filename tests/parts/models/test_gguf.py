"""GGUF files written here with the gguf package, read back, and compared with transformers' own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind

from nybble.core.errors import FileError, ModelError
from nybble.models.sources.gguf_header import read_gguf_header
from nybble.models.sources.gguf_names import ARCHS, WHOLE
from nybble.models.sources.gguf_rope import shortest
from nybble.models.sources.open import open_source
from nybble.pipelines.load import load
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe
from nybble.walk.settings import Settings

MODEL_TYPES = {arch: entry.model_type for arch, entry in ARCHS.items()}
WIDE = {"hidden_size": 64, "intermediate_size": 64}


def byte_tokens() -> list[str]:
    """The 256 byte symbols of byte-level BPE."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_metadata(writer: gguf.GGUFWriter, arch: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    tokens = [*byte_tokens(), "he", "<|end|>"] + [f"<|{i}|>" for i in range(config.vocab_size - 258)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens[: config.vocab_size])
    writer.add_token_types([1] * 257 + [3] * (config.vocab_size - 257))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(257)


def as_llama_cpp(name: str, tensor: torch.Tensor, arch: str, config: Any) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to a tensor, written from its side: rows of q and k become neighbours."""
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        width = tensor.shape[0] // heads
        order = [
            h * width + half * (width // 2) + i for h in range(heads) for i in range(width // 2) for half in (0, 1)
        ]
        tensor = tensor[order]
    return (tensor + 1 if arch.startswith("gemma") and name.endswith("norm.weight") else tensor).numpy()


@torch.no_grad()
def write_gguf(path: Path, arch: str, model: Any, kind: Kind = Kind.F32, **pairs: str) -> None:
    """Write ``model`` as llama.cpp would."""
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, arch, model.config)
    for key, value in pairs.items():
        writer.add_string(key.replace("__", "."), value)
    block = {module: tensor for tensor, module in ARCHS[arch].block.items()}
    whole = {module: tensor for tensor, module in WHOLE.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, leaf = name.rpartition(".")
        if stem in whole:
            target = f"{whole[stem]}.{leaf}"
        else:
            _, _, index, module = stem.split(".", 3)
            target = f"blk.{index}.{block[module]}.{leaf}"
        values = as_llama_cpp(name, tensor, arch, model.config)
        if kind is not Kind.F32 and tensor.ndim == 2:
            writer.add_tensor(target, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny(make_model: Any) -> Callable[..., Any]:
    """The tiny model behind an architecture, with a vocabulary that byte-level BPE fits in."""

    def make(arch: str, **changes: Any) -> Any:
        sizes = {"vocab_size": 264, "bos_token_id": 1, "eos_token_id": 257, **changes}
        if arch == "llama":
            sizes = {"attention_bias": False, **sizes}
        return make_model(MODEL_TYPES[arch], **sizes)

    return make


@pytest.mark.parametrize("arch", sorted(ARCHS))
@torch.no_grad()
def test_architectures_come_back_exactly(arch: str, tiny: Any, tmp_path: Path, input_ids: torch.Tensor) -> None:
    # Gemma 3: five sliding blocks to a full one, which the file doesn't say.
    model = tiny(arch, **({"num_hidden_layers": 6, "layer_types": None} if arch == "gemma3" else {}))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, arch, model)
    source = open_source(str(path))
    ours = source.model(torch.float32)
    assert type(ours) is type(model) and source.streamable
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert torch.equal(ours(input_ids=input_ids).logits, model(input_ids=input_ids).logits)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert ours.config.eos_token_id == 257 and ours.generation_config.eos_token_id == 257


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_transformers_reads_the_same_weights(arch: str, tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate")
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", arch, tiny(arch, **WIDE, head_dim=128 if arch == "qwen3" else 16), Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ours = open_source(str(tmp_path / "tiny.gguf")).model(torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_biases_are_reordered_too(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", attention_bias=True)
    write_gguf(tmp_path / "tiny.gguf", "llama", model)
    ours = open_source(str(tmp_path / "tiny.gguf"))
    assert ours.config.attention_bias
    name = "model.layers.0.self_attn.k_proj.bias"
    assert torch.equal(ours.load([name])[name], model.state_dict()[name])


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_kinds_dequantize_as_gguf_says(kind: Kind, tiny: Any, tmp_path: Path) -> None:
    # 50 rows and 264 rows: neither a multiple of gguf's 16 rows a step.
    model = tiny("qwen2", **{**WIDE, "intermediate_size": 96})
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "qwen2", model, kind)
    ours = open_source(str(path))
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        weight = model.state_dict()[name].numpy()
        expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
        loaded = ours.load([name])[name]
        assert np.array_equal(loaded.numpy(), expected)
        loaded.zero_()
        assert np.array_equal(ours.load([name])[name].numpy(), expected)
        assert ours.bytes_of([name]) == gguf.quantize(weight, kind).nbytes


def test_the_tokenizer_is_rebuilt(tiny: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "qwen2", tiny("qwen2"), tokenizer__chat_template="{{ messages[0]['content'] }}")
    tokenizer = open_source(str(tmp_path / "tiny.gguf")).tokenizer()
    ids = tokenizer("he is 12<|end|>")["input_ids"]
    assert ids[0] == 256 and ids[-1] == 257 and tokenizer.decode(ids) == "he is 12<|end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he is 12"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "a   12", ["a", "ĠĠĠ", "1", "2"]),
        ("gpt-2", "a   12", ["a", "ĠĠ", "Ġ12"]),
        ("default", "a   12", ["a", "ĠĠ", "Ġ", "12"]),
        ("qwen2", "a   12", ["a", "ĠĠ", "Ġ", "1", "2"]),
        ("llama-bpe", "a 1234 I'LL", ["a", "Ġ", "123", "4", "ĠI", "'LL"]),
    ],
)
def test_pre_tokenizers_cut_as_llama_cpp(pre: str, text: str, pieces: list[str]) -> None:
    from nybble.models.sources.gguf_tokenizer import build_tokenizer

    tokens = byte_tokens()
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [], "tokenizer.ggml.token_type": [1] * len(tokens),
    }  # fmt: skip
    backend: Any = build_tokenizer(metadata, Path("x.gguf"))
    cut = backend.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


def test_bos_is_added_where_the_file_says_so() -> None:
    from nybble.models.sources.gguf_tokenizer import build_tokenizer

    tokens = [*byte_tokens(), "<s>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [],
        "tokenizer.ggml.token_type": [1] * 256 + [3], "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    assert build_tokenizer(metadata, Path("x.gguf"))("a")["input_ids"][0] == 256
    with pytest.raises(ModelError, match=r"x.gguf: pre-tokenizer 'smolm' is unknown. Did you mean 'smollm'"):
        build_tokenizer({**metadata, "tokenizer.ggml.pre": "smolm"}, Path("x.gguf"))
    with pytest.raises(ModelError, match=r"tokenizer.ggml.merges is not a list of str"):
        build_tokenizer({**metadata, "tokenizer.ggml.merges": [3]}, Path("x.gguf"))


def test_what_cannot_be_read_is_named(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "qwen2", tiny("qwen2"), qwen2__rope__scaling__type="longrope")
    with pytest.raises(ModelError, match="rope scaling 'longrope'"):
        open_source(str(path))
    writer = gguf.GGUFWriter(path, "falcon")
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"architecture 'falcon' is unknown. Known: gemma2, gemma3, llama, qwen2"):
        open_source(str(path))


@torch.no_grad()
def test_extra_and_missing_tensors(tiny: Any, tmp_path: Path) -> None:
    path, model = tmp_path / "tiny.gguf", tiny("qwen2")
    write_gguf(path, "qwen2", model)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"))
    with pytest.raises(ModelError, match=r"blk.1.ffn_xp.weight has no place in a qwen2 model"):
        open_source(str(path)).stored()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"))
    with pytest.raises(ModelError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        open_source(str(path)).stored()


def test_linear_rope_scaling(tiny: Any, tmp_path: Path) -> None:
    from nybble.models.sources.gguf_names import config_dict

    metadata: dict[str, Any] = {f"qwen2.{key}": 1 for key in ARCHS["qwen2"].keys}
    metadata |= {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 8.0, "qwen2.rope.freq_base": 1e6}
    raw = config_dict(metadata, {"token_embd.weight": (7, 3)}, "qwen2", ARCHS["qwen2"], "x")
    assert raw["rope_parameters"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert raw["vocab_size"] == 7 and raw["tie_word_embeddings"]


def test_shortest_keeps_the_float32() -> None:
    assert shortest(9.999999747378752e-06) == 1e-05
    for value in (1e-6, 100000.0, 0.1, 50.0):
        assert shortest(float(np.float32(value))) == value


def test_truncation_at_every_length(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "qwen2", tiny("qwen2"))
    data = path.read_bytes()
    assert len(read_gguf_header(path).tensors) == 27  # 12 in each of two blocks, embeddings, norm, head
    for length in [*range(0, 400, 7), len(data) // 2, len(data) - 33]:
        path.write_bytes(data[:length])
        with pytest.raises(FileError, match=r"tiny.gguf"):
            read_gguf_header(path)
    with pytest.raises(FileError, match="missing"):
        read_gguf_header(tmp_path / "none.gguf")


@pytest.mark.parametrize("what", ["full disk", "unknown kind"])
def test_its_tokenizer_in_the_result(what: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written before the first block; one that can't be rebuilt is missed by nobody who only rounds."""
    write_gguf(tmp_path / "tiny.gguf", "qwen2", tiny("qwen2"))
    recipe, out = build_recipe("rtn", weights="int4 group=16"), tmp_path / "out"
    lines: list[str] = []
    if what == "full disk":

        def full(*_: Any, **__: Any) -> None:  # tokenizers reports it as a plain Exception
            raise Exception("No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
            with pytest.raises(FileError, match="the tokenizer's files can't be written: No space left on device"):
                quantize(str(tmp_path / "tiny.gguf"), recipe, out=out)
        assert not (tmp_path / "out.partial").exists()
    else:

        def unknown(*_: Any) -> None:
            raise ModelError("pre-tokenizer 'odd' is unknown")

        monkeypatch.setattr("nybble.models.sources.gguf_tokenizer.build_tokenizer", unknown)
    quantize(
        str(tmp_path / "tiny.gguf"), recipe, out=out, settings=Settings(resume=what == "full disk"),
        announce=lines.append,
    )  # fmt: skip
    assert (out / "tokenizer.json").exists() == (what == "full disk")
    assert ("the result has no tokenizer: pre-tokenizer 'odd' is unknown" in lines) == (what != "full disk")
    assert (load(out)[1] is None) == (what != "full disk")
