"""gpt-oss' MXFP4: transformers' own decoder says what the values are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parts.models.layouts.peers import write
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import nybble
from nybble.core.errors import FileError
from nybble.models.sources.open import open_source
from nybble.nn.experts import PackedExperts


def _model() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
        "rope_scaling": None, "sliding_window": 8,
    }  # fmt: skip
    make: Any = GptOssForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(GptOssConfig(**sizes)).to(torch.bfloat16).eval()


def checkpoint(folder: Path) -> tuple[Path, dict[str, Tensor], Any]:
    """A folder, the bfloat16 values, and the float model that has them."""
    model, g = _model(), torch.Generator().manual_seed(1)
    tensors, values = dict(model.state_dict()), {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=g, dtype=torch.uint8)
        scales = torch.randint(118, 124, blocks.shape[:3], generator=g, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = convert_moe_packed_tensors(blocks, scales)
        model.get_parameter(name).data.copy_(values[name])
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return write(folder, model, tensors, said), values, model


def test_values_are_transformers_own(tmp_path: Path) -> None:
    folder, wanted, _ = checkpoint(tmp_path / "q")
    found = open_source(str(folder)).load(list(wanted))
    assert len(wanted) == 4
    for key, value in wanted.items():
        assert value.shape == found[key].shape and torch.equal(found[key].to(value.dtype), value), key


@torch.no_grad()
def test_a_model_keeps_its_experts_packed(tmp_path: Path) -> None:
    folder, wanted, plain = checkpoint(tmp_path / "q")
    model, _ = nybble.load(folder)
    for key, value in wanted.items():
        owner, _, leaf = key.rpartition(".")
        experts: Any = getattr(model.get_submodule(owner), leaf)
        assert isinstance(experts, PackedExperts)
        assert all(torch.equal(experts[i], value[i]) for i in range(4))
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(2))
    a, b = model(input_ids=ids).logits.float(), plain(input_ids=ids).logits.float()
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
    assert b.std() > 0


def test_bad_ones_are_refused(tmp_path: Path) -> None:
    folder, _, _ = checkpoint(tmp_path / "q")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.experts.down_proj"
    for change in (
        {f"{key}_scales": None},
        {f"{key}_blocks": None},
        {f"{key}_scales": tensors[f"{key}_scales"][:3].clone()},
    ):
        left = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        save_file(left, folder / "model.safetensors")
        with pytest.raises(FileError, match="down_proj"):
            open_source(str(folder))
