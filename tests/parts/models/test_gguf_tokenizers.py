"""Tokenizers rebuilt from GGUF metadata give llama.cpp's own ids; what a file leaves out has llama.cpp's defaults.

The ids in gguf_tokenizers.json are llama.cpp's (benchmarks/gguf_tokenizers.py --fixture); the benchmark compares 10,000
lines for each name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from nybble.core.errors import FileError, ModelError
from nybble.models.sources.gguf_names import ARCHS, config_dict
from nybble.models.sources.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from nybble.models.sources.open import open_source

GIVEN: dict[str, Any] = json.loads(Path(__file__).with_suffix("").with_name("gguf_tokenizers.json").read_text("utf-8"))
SAME = {
    pre: next(name for name in GIVEN["ids"] if PRE_TOKENIZERS[name] == rules) for pre, rules in PRE_TOKENIZERS.items()
}


def metadata(**more: Any) -> dict[str, Any]:
    count = len(GIVEN["tokens"])
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [*GIVEN["tokens"], "<s>", "</s>"],
        "tokenizer.ggml.merges": GIVEN["merges"], "tokenizer.ggml.token_type": [1] * count + [3, 3],
        "tokenizer.ggml.bos_token_id": count, "tokenizer.ggml.eos_token_id": count + 1,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }  # fmt: skip


def ids_of(text: list[str], **more: Any) -> list[list[int]]:
    found: list[list[int]] = build_tokenizer(metadata(**more), Path("x.gguf"))(text)["input_ids"]
    return found


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_are_llama_cpps(pre: str) -> None:
    assert ids_of(GIVEN["lines"], pre=pre) == GIVEN["ids"][SAME[pre]]


def test_rules_differ_in_ids() -> None:
    """Cutting, whole words without merges, a token at the beginning: each shows in the lines."""
    different = {json.dumps(ids) for ids in GIVEN["ids"].values()}
    assert len(different) == len(GIVEN["ids"]) == 6
    bos = len(GIVEN["tokens"])
    assert all((rows[0][0] == bos) == PRE_TOKENIZERS[pre].add_bos for pre, rows in GIVEN["ids"].items())


def test_what_the_file_leaves_out() -> None:
    lines, bos, eos = ["a b"], len(GIVEN["tokens"]), len(GIVEN["tokens"]) + 1
    (plain,) = ids_of(lines, pre="gpt-2")
    assert ids_of(lines) == ids_of(lines, pre="default")
    assert ids_of(lines, pre="gpt-2", add_bos_token=True) == [[bos, *plain]]
    assert ids_of(lines, pre="gpt-2", add_bos_token=True, add_eos_token=True) == [[bos, *plain, eos]]
    assert ids_of(lines, pre="llama-bpe")[0][0] == bos
    assert bos not in ids_of(lines, pre="llama-bpe", add_bos_token=False)[0]
    without = metadata(pre="llama-bpe")
    del without["tokenizer.ggml.bos_token_id"], without["tokenizer.ggml.token_type"]
    assert build_tokenizer(without, Path("x.gguf"))("a")["input_ids"][0] == 11
    with pytest.raises(ModelError, match="every text is to have a bos token, and 9999 is none of"):
        build_tokenizer(metadata(pre="llama-bpe", bos_token_id=9999), Path("x.gguf"))


BARE = {
    "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def config_of(name: str, **more: Any) -> dict[str, Any]:
    pairs = {f"{name}.{key}": value for key, value in (BARE | more).items()}
    return config_dict(pairs, {"token_embd.weight": (300, 32)}, name, ARCHS[name], "x.gguf")


@pytest.mark.parametrize("name", ARCHS)
def test_optional_keys_have_llama_cpps_defaults(name: str) -> None:
    """As llama-hparams.cpp and llama-model.cpp have them: as many heads of keys, width over heads, no scaled rope."""
    raw = config_of(name)
    assert raw["num_key_value_heads"] == 4
    assert raw.get("head_dim", 8) == 8
    rope = raw["rope_parameters"].get("full_attention", raw["rope_parameters"])
    assert rope == {"rope_type": "default", "rope_theta": 10_000.0}
    assert raw.get("layer_types") == (["full_attention"] * 2 if name == "gemma3" else None)
    scaled = config_of(name, **{"rope.scaling.factor": 4.0})["rope_parameters"]
    assert scaled.get("full_attention", scaled) == {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    assert config_of(name, **{"attention.head_count_kv": 2})["num_key_value_heads"] == 2


def test_a_head_is_as_wide_as_its_keys() -> None:
    assert config_of("llama", **{"rope.dimension_count": 16, "attention.key_length": 16})["head_dim"] == 16
    assert config_of("gemma3", **{"attention.sliding_window": 8}).get("layer_types") is None


def write(path: Path, **pairs: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in pairs.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint16
        add(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_say_what_they_are(tmp_path: Path) -> None:
    part = write(tmp_path / "m-00002-of-00003.GGUF", split__no=1, split__count=3)
    with pytest.raises(
        ModelError, match=r"is part 2 of 3 of a split model\. Join them first: llama-gguf-split --merge"
    ):
        open_source(str(part))
    with pytest.raises(ModelError, match="is a GGUF of type 'adapter' and no model"):
        open_source(str(write(tmp_path / "lora.gguf", general__type="adapter")))
    nameless = write(tmp_path / "sha256-0123")
    with pytest.raises(ModelError, match=r"llama\.context_length is None"):  # read as a GGUF, whatever its name
        open_source(str(nameless))
    with pytest.raises(ModelError, match=r"has no config\.json and holds lora\.gguf; give that file"):
        open_source(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(FileError, match="Give the folder that it is in"):
        open_source(str(tmp_path / "model.safetensors"))
