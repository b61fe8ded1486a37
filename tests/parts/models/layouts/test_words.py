"""GPTQ, AWQ and auto-round as their own packers have it; what their own code reads says what the values are.

benchmarks/peers/words.py made the file: layers packed by GPTQModel, AutoAWQ and auto-round, the quantization_config
that each writes, and the digest of the float16 weight that its dequantizer gives.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.core.tensorheader import read_tensor_header
from nybble.models.sources.layouts import Files, packed_weights

PATH = Path(__file__).with_name("words.safetensors")
HEADER = read_tensor_header(PATH)
MODULE = "model.layers.0.mlp.up_proj"


def case(name: str) -> tuple[dict[str, Any], Files, str]:
    """What config.json says, the files, and the digest."""
    said = json.loads(HEADER.metadata[name])
    with safe_open(PATH, framework="pt") as file:
        tensors = {n.partition("/")[2]: file.get_tensor(n) for n in HEADER.tensors if n.partition("/")[0] == name}
    entries = {f"{MODULE}.{leaf}": HEADER.tensors[f"{name}/{leaf}"] for leaf in tensors}
    read = {f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()}
    return said["quantization_config"], Files(name, entries, read.__getitem__), said["sha256"]


def digest(config: dict[str, Any], files: Files) -> str:
    """Of the float16 weight that nybble reads."""
    found, _ = packed_weights(config, files)
    (weight,) = found.values()
    values: Tensor = weight.values(files.read).half() + 0  # -0 counts as 0
    assert values.shape == (32, 64) and values.isfinite().all()
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", HEADER.metadata)
def test_values_are_the_peers_own(name: str) -> None:
    config, files, wanted = case(name)
    assert digest(config, files) == wanted


def test_what_the_file_covers() -> None:
    """Every width, all formats, both orders of columns; else the test above proves less than it says."""
    names = list(HEADER.metadata)
    for form, bits in (("gptq", 2348), ("gptq_v2", 234), ("gptq_p", 34567)):
        assert all(any(n.startswith(f"gptqmodel {form} {b} bits") for n in names) for b in str(bits))
    assert sum("in another order" in n for n in names) >= 6 and sum(n.startswith("autoawq") for n in names) == 3
    assert {n.split()[1] for n in names if n.startswith("auto-round")} == {
        "auto_gptq", "auto_round", "auto_awq", "auto_round:auto_awq",
    }  # fmt: skip


def test_modules_with_bits_of_their_own() -> None:
    """GPTQModel's ``dynamic``: the first pattern that fits; auto-round's ``extra_config``: names, then patterns."""
    config, files, wanted = case("gptqmodel gptq 4 bits")
    own = {"bits": 4, "group_size": 32}
    for dynamic in ({"+:.*up_proj": own}, {r".*layers\.0\.": own}, {"-:.*down": {}, "+:.*": own, ".*": {"bits": 2}}):
        assert digest({**config, "bits": 8, "group_size": 128, "dynamic": dynamic}, files) == wanted
    with pytest.raises(FileError, match="leaves it out"):
        packed_weights({**config, "dynamic": {"-:.*up_proj": {}}}, files)
    config, files, wanted = case("auto-round auto_round 3 bits")
    for extra in ({MODULE: {"bits": 3}}, {"other": {"bits": 2}, r".*mlp\.up.*": {"bits": 3}}):
        assert digest({**config, "bits": 8, "extra_config": extra}, files) == wanted


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*|a)*b", ".*" * 12, "(", r"(a)\1+.*"])
def test_patterns_that_take_for_ever_are_refused(pattern: str) -> None:
    config, files, _ = case("gptqmodel gptq 4 bits")
    with pytest.raises(FileError, match=r"for ever|no regular expression"):
        packed_weights({**config, "dynamic": {pattern: {}}}, files)


def test_other_kinds_of_auto_round_are_named() -> None:
    config, files, _ = case("auto-round auto_round 3 bits")
    with pytest.raises(ModelError, match="nv_fp"):
        packed_weights({**config, "data_type": "nv_fp"}, files)
    assert "activations" in packed_weights({**config, "act_bits": 8}, files)[1].left
