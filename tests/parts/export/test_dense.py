"""Dense folders: any program loads them, and they hold what the packed ones calculate with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.parts.export.folders import quantized
from tests.tiny import input_ids

from nybble.checkpoint.load import load_quantized
from nybble.core.errors import UsageError
from nybble.pipelines.export import export

ALONE = """
import sys, torch, transformers
torch.set_num_threads(1)
model = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2], dtype="auto").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[3])).logits, sys.argv[4])
assert "nybble" not in sys.modules
"""


@pytest.mark.parametrize(
    ("family", "changes", "weights"),
    [
        ("llama", {"weights": "nf4-dq"}, 14),
        ("llama", {"weights": "int4 group=16 symmetric=false", "embeddings": "int8 channel"}, 16),
        ("gpt2", {"weights": "float4_e2m1fn group=16"}, 8),
        ("qwen3_moe", {"weights": "int4 group=16"}, 24),
        ("mixtral", {"weights": "mxfp4"}, 24),
        ("bert", {"weights": "int3 group=16"}, 14),
        ("resnet", {"weights": "int4 channel"}, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_families(family: str, changes: dict[str, Any], weights: int, tmp_path: Path) -> None:
    found = export(quantized(family, **changes), tmp_path / "d", "dense", check=True)
    checked = found["check"]
    assert checked["weights"] == weights or (family == "resnet" and checked["weights"] > 3)
    if not checked["uncalled"]:
        # in bfloat16: transformers adds experts up in another order, and a norm rounds once more than a bias
        assert checked["cosine"] > (0.999 if family in ("mixtral", "qwen3_moe", "resnet") else 1 - 1e-5)
    else:
        assert family == "resnet"


def test_folded_norms_come_back(tmp_path: Path) -> None:
    """A BatchNorm that went into a convolution is there again, and only adds its bias."""
    folder = quantized("resnet", weights="int8 channel")
    export(folder, tmp_path / "d", "dense:f32")
    from transformers import ResNetForImageClassification

    model: Any = ResNetForImageClassification.from_pretrained(tmp_path / "d", dtype=torch.float32)
    model.eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = load_quantized(folder, torch.float32)(image).logits
        assert torch.allclose(model(image).logits, ours, rtol=0, atol=2e-6 * float(ours.abs().max()))


def test_without_nybble(tmp_path: Path) -> None:
    """In a process that never imports nybble, the same logits bit for bit."""
    folder = quantized(weights="int4 group=16")
    export(folder, tmp_path / "d", "dense")
    torch.save(input_ids(), tmp_path / "ids.pt")
    command = [
        sys.executable,
        "-c",
        ALONE,
        "AutoModelForCausalLM",
        *(str(tmp_path / n) for n in ("d", "ids.pt", "o.pt")),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with torch.no_grad():
        ours = load_quantized(folder, None)(input_ids=input_ids()).logits
    assert torch.equal(torch.load(tmp_path / "o.pt"), ours)


@pytest.mark.parametrize(("option", "dtype"), [("", "bfloat16"), (":f16", "float16"), (":float32", "float32")])
def test_dtypes(option: str, dtype: str, tmp_path: Path) -> None:
    found = export(quantized(weights="int4 group=16"), tmp_path / "d", f"dense{option}", check=True)
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "d" / "config.json").read_text())["dtype"] == dtype
    assert found["check"]["exact_in"] == dtype and found["check"]["largest"] == 0


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    folder = quantized(weights="int8 channel", activations="int8 token", kv="int8 token")
    said: list[str] = []
    found = export(folder, tmp_path / "d", "dense", announce=said.append)
    assert said == found["notes"] and "activations are not rounded" in said[0] and "KV cache" in said[1]


def test_options_that_there_are_not(tmp_path: Path) -> None:
    folder = quantized(weights="int4 group=16")
    with pytest.raises(UsageError, match=r"unknown option 'float18'.*float16"):
        export(folder, tmp_path / "d", "dense:float18")
    with pytest.raises(UsageError, match="takes nothing behind a colon"):
        export(folder, tmp_path / "d", "compressed-tensors:x")
    with pytest.raises(UsageError, match=r"unknown export target 'dens'\. Did you mean 'dense'"):
        export(folder, tmp_path / "d", "dens")
    with pytest.raises(UsageError, match="say --target"):
        export(folder, tmp_path / "d")
