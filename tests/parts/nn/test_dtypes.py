"""Models that are cast, kept in float32 in parts, or offloaded: quantized layers do as the float ones would."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, logits, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import nybble
from nybble.nn.packed import Packed
from nybble.pipelines.request import build_recipe

WEIGHTS = "int4 group=16 scale_format=float16"


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with quantized embeddings and, of the second, experts."""
    tmp = tmp_path_factory.mktemp("dtypes")
    recipe = build_recipe("rtn", weights=WEIGHTS, embeddings="int8 channel")
    nybble.quantize(str(save_tiny(tmp / "float", request.param)), recipe, out=str(tmp / "out"), form="native")
    return tmp / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_whole_model_runs_in_the_dtype_asked_for(folder: Path, dtype: torch.dtype) -> None:
    """However it is asked for; the numbers are those of the float model with the rounded weights in that dtype."""
    auto: Any = AutoModelForCausalLM
    want, _ = nybble.load(folder, dtype=dtype)
    cast: Any = nybble.load(folder)[0]
    cast.to(dtype=dtype)
    seen = [module.dtype for model in (want, cast) for module in model.modules() if isinstance(module, Packed)]
    assert set(seen) == {dtype} and logits(want).dtype == logits(cast).dtype == dtype
    assert want.get_input_embeddings()(input_ids()).dtype == dtype
    assert torch.equal(logits(auto.from_pretrained(folder, dtype=dtype)), logits(want))
    near = logits(nybble.load(folder)[0]).float()
    assert (logits(cast) - near).norm() < 0.03 * near.norm()


def t5_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=input_ids(), decoder_input_ids=input_ids()).logits
    return found


def rounded(model: Any, like: Any) -> Any:
    """The float model ``like`` with the weights that the quantized ``model`` stands for."""
    found, state = copy.deepcopy(like), model.state_dict()
    found.load_state_dict({n: state[n].to(t.dtype) for n, t in found.state_dict().items() if n in state}, strict=False)
    for name, packed in model.named_modules():
        if isinstance(packed, Packed):
            weight = found.get_parameter(name)
            weight.data = packed.dequantize(torch.float32).to(weight.dtype)
    return found


def test_layers_that_a_family_keeps_in_float32(tmp_path: Path) -> None:
    """T5 in float16 has its ``wo`` in float32; quantized as well, from all loaders and in memory."""
    sizes: dict[str, Any] = {
        "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "decoder_start_token_id": 0,
    }  # fmt: skip
    auto: Any = T5ForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto(T5Config(**sizes)).eval()
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.weight.data *= 1e6  # float16 ends at 65504
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    half = auto.from_pretrained(tmp_path / "float", dtype=torch.float16)
    assert half.decoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32
    assert torch.equal(t5_logits(nybble.load(tmp_path / "float", dtype=torch.float16)[0]), t5_logits(half))

    recipe = build_recipe("rtn", weights="int8 group=16 scale_format=bfloat16")
    nybble.quantize(str(tmp_path / "float"), recipe, out=str(tmp_path / "out"), form="native")
    want = t5_logits(rounded(auto.from_pretrained(tmp_path / "out", dtype=torch.float32), half))
    assert want.isfinite().all()
    for found in (
        auto.from_pretrained(tmp_path / "out", dtype=torch.float16),
        nybble.load(tmp_path / "out", dtype=torch.float16)[0],
    ):
        assert torch.equal(t5_logits(found), want)

    memory = copy.deepcopy(half)
    nybble.quantize(memory, recipe)
    assert torch.equal(t5_logits(memory), t5_logits(rounded(memory, half)))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("name", ["auto", "bfloat16", "float32"])
def test_device_maps_and_dtypes_by_name(folder: Path, device_map: Any, name: str) -> None:
    """As transformers takes them; ``torch_dtype`` is what people still write."""
    auto: Any = AutoModelForCausalLM
    dtype = torch.bfloat16 if name == "auto" else getattr(torch, name)
    want = logits(nybble.load(folder, dtype=dtype)[0])
    for key in ("dtype", "torch_dtype"):
        model = auto.from_pretrained(folder, device_map=device_map, **{key: name})
        found = logits(model)
        assert model.dtype == found.dtype == dtype and torch.equal(found, want)
        assert all(buffer.device.type == "cpu" for buffer in model.buffers())


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_offloaded(folder: Path, tmp_path: Path, offload_buffers: bool) -> None:
    """Packed weights leave with the rest, come for each call, and are written again as they were."""
    auto: Any = AutoModelForCausalLM
    whole = auto.from_pretrained(folder)
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}
    model = auto.from_pretrained(
        folder, device_map={**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}, offload_folder=tmp_path / "off",
        offload_buffers=offload_buffers,
    )  # fmt: skip
    for _ in range(2):
        assert torch.equal(logits(model), logits(whole))
        modules = (*model.model.embed_tokens.modules(), *model.model.layers[0].modules())
        away = [module for module in modules if isinstance(module, Packed)]
        assert all(buffer.device.type == "meta" for packed in away for buffer in packed.buffers())
        assert all(packed._view is None for packed in away)  # nothing keeps what was brought
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "again")), logits(whole))
