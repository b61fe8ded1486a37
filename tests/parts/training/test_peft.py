"""LoRA of PEFT on packed layers: trains, is saved, loaded and merged; gradients reach what stands before a rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, logits, save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import nybble
from nybble.core.errors import ModelError, SchemeError
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer

peft = pytest.importorskip("peft", reason="needs PEFT, which nybble's extra 'test' brings")

# PEFT asks transformers in words that its newest release calls old.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SCHEMES = {
    "weights": {"weights": "int4 group=16 scale_format=float16"},
    "W8A8": {"weights": "int8 channel", "activations": "int8 token"},
    "NVFP4": {"weights": "nvfp4", "activations": "nvfp4"},
    "matmuls": {"weights": "int8 channel", "activations": "int8 token", "matmuls": "int8 tensor"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a scheme -> a folder in nybble's own form, or of :data:`CT` -> in compressed-tensors'; each made once."""
    room = tmp_path_factory.mktemp("peft")
    save_tiny(room / "float")

    @cache
    def made(scheme: str) -> Path:
        if scheme in CT:
            return Path(nybble.quantize(str(room / "float"), "rtn", out=room / scheme, **CT[scheme])[0])
        model, tokenizer = nybble.load(room / "float")
        nybble.quantize(model, build_recipe("rtn", **SCHEMES[scheme]))
        return nybble.save(model, room / scheme, tokenizer, form="native")

    return made


def config(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def trained(model: Any, steps: int = 4) -> tuple[Any, list[float], list[str]]:
    """The model with adapters, its losses, and the adapters without a gradient in the second step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = peft.get_peft_model(model, config()).train()
    ours = {name: p for name, p in found.named_parameters() if p.requires_grad}
    optimizer, losses, still = torch.optim.AdamW(ours.values(), lr=1e-2), [], []
    for step in range(steps):
        loss = found(input_ids=input_ids(), labels=input_ids()).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 1:  # in the first one B is 0, and so is the gradient of A
            still = [name for name, p in ours.items() if p.grad is None or not p.grad.any()]
        optimizer.step()
        losses.append(float(loss.detach()))
    return found.eval(), losses, still


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trains_is_saved_loaded_and_merged(tmp_path: Path, scheme: str, written: Callable[[str], Path]) -> None:
    auto: Any = AutoModelForCausalLM
    out = written(scheme)
    base = auto.from_pretrained(out)
    before = logits(base)
    codes = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    layers = [name for name, module in base.named_modules() if isinstance(module, QuantLinear)]
    model, losses, still = trained(base)
    adapters = {name.split(".lora_A")[0] for name, p in model.named_parameters() if ".lora_A." in name}
    assert adapters == {f"base_model.model.{name}" for name in layers} and len(layers) == 14
    assert not still and losses[-1] < losses[0] - 0.3
    state = model.get_base_model().state_dict()
    assert all(torch.equal(state[_inside(name, state)], tensor) for name, tensor in codes.items())

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(auto.from_pretrained(out), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))

    merged = again.merge_and_unload(safe_merge=True)
    change = logits(model) - before
    share = 0.05 if scheme in ("weights", "W8A8", "matmuls") else 0.5  # a merged adapter sees what 4 bits left of x
    assert (logits(merged) - logits(model)).norm() < share * change.norm()
    merged.save_pretrained(tmp_path / "by transformers")
    nybble.save(merged, tmp_path / "by nybble", form="native")
    for folder in ("by transformers", "by nybble"):
        assert torch.equal(logits(auto.from_pretrained(tmp_path / folder)), logits(merged))
        assert torch.equal(logits(nybble.load(tmp_path / folder)[0]), logits(merged))


def _inside(name: str, state: dict[str, Tensor]) -> str:
    """The name of a tensor in the model whose layers stand inside adapters now."""
    if name in state:
        return name
    return next(key for key in state if key.replace(".base_layer", "") == name)


CT: dict[str, Any] = {
    "zero points": {"weights": "int4 group=16 symmetric=false"},
    "rounded inputs": {"weights": "int8 channel", "activations": "int8 token"},
    "divisors": {"weights": "nvfp4", "activations": "none", "target": "compressed-tensors"},
}


@pytest.mark.parametrize("foreign", [False, True], ids=["nybble's folder", "another's folder"])
@pytest.mark.parametrize("case", CT)
def test_on_folders_in_compressed_tensors_form(
    case: str, foreign: bool, tmp_path: Path, written: Callable[[str], Path]
) -> None:
    """Packed when nybble.load reads them, so adapters train on codes; what is saved loads, and merged it is exact."""
    pytest.importorskip("compressed_tensors", reason="the form of that name")
    out = shutil.copytree(written(case), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    if foreign:
        (out / "nybble.json").unlink()
    base, _ = nybble.load(out)
    before = logits(base)
    codes = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model, losses, still = trained(base)
    adapters = {name.split(".lora_A")[0] for name, p in model.named_parameters() if ".lora_A." in name}
    assert len(adapters) == 14 and not still and losses[-1] < losses[0] - 0.3
    state = model.get_base_model().state_dict()
    assert all(torch.equal(state[_inside(name, state)], tensor) for name, tensor in codes.items())

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(nybble.load(out)[0], tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model)) and not torch.allclose(logits(again), before)
    with again.disable_adapter():
        assert torch.equal(logits(again), before)

    merged = again.merge_and_unload(safe_merge=True)
    assert (logits(merged) - logits(model)).norm() < 0.05 * (logits(model) - before).norm()
    saved = nybble.save(merged, tmp_path / "merged", tiny_tokenizer())
    form = json.loads((saved / "nybble.json").read_text())["form"]
    assert form["name"] == "native" and "without the correction lorc, or a merged adapter" in form["why"]
    assert torch.equal(logits(nybble.load(saved)[0]), logits(merged))


def test_a_second_adapter_and_a_model_in_memory() -> None:
    """ "all-linear" means the same layers again, none inside an adapter; each adapter is alone, or off."""
    model = tiny_model()
    nybble.quantize(model, build_recipe("rtn", **SCHEMES["weights"]))
    base = logits(model)
    found = peft.get_peft_model(model, config(init_lora_weights=False))
    first = logits(found)
    found.add_adapter("second", config(r=2, init_lora_weights=False))
    names = {n.split(".lora_A")[0]: n.rpartition("lora_A.")[2] for n, _ in found.named_parameters() if ".lora_A." in n}
    assert len(names) == 14 and not any("base_layer" in name or "lora_" in name for name in names)
    assert torch.equal(logits(found), first)
    found.set_adapter("second")
    assert not torch.allclose(logits(found), first)
    with found.disable_adapter():
        assert torch.equal(logits(found), base)


def test_merged_becomes_float_weights_that_are_quantized_again(tmp_path: Path, written: Callable[[str], Path]) -> None:
    """A merged folder is refused as it is, with the way: written out dense, it is a float model like any other."""
    auto: Any = AutoModelForCausalLM
    out = written("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(auto.from_pretrained(out), config(init_lora_weights=False))
    merged = adapted.merge_and_unload()
    nybble.save(merged, tmp_path / "merged", tiny_tokenizer())
    recipe = build_recipe("rtn", **SCHEMES["W8A8"])
    with pytest.raises(ModelError, match="--target dense"):
        nybble.quantize(str(tmp_path / "merged"), recipe, out=str(tmp_path / "again"))
    nybble.export(tmp_path / "merged", tmp_path / "dense", target="dense")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "dense")), logits(merged))
    again, _ = nybble.load(tmp_path / "dense")
    nybble.quantize(again, recipe)
    assert (logits(again) - logits(merged)).norm() < 0.1 * logits(merged).norm()


def test_merged_is_exact_and_undone() -> None:
    """base + scaling B A, in float32, whatever the layer was before (GPT-2's Conv1D is [out, in] when packed)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        packed = Quantizer("int4 group=16").quantize(torch.randn(24, 32))
        model = nn.Sequential(QuantLinear(packed, torch.randn(24)))
        found = peft.get_peft_model(model, config(target_modules=["0"], lora_bias=True, init_lora_weights=False))
    layer = found.base_model.model[0]
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    nn.init.ones_(b.bias)
    want = packed.dequantize() + 2.0 * b.weight @ a.weight  # lora_alpha 8 over r 4
    bias = layer.base_layer.bias.clone()
    layer.merge()
    assert torch.equal(layer.base_layer.weight(torch.float32), want)
    assert torch.equal(layer.base_layer.bias, bias + 2.0)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight(torch.float32), packed.dequantize())
    assert isinstance(layer.base_layer.weight, Packed) and torch.allclose(layer.base_layer.bias, bias)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init_lora_weights": "pissa"}, SchemeError, "init_lora_weights='pissa'.*packed"),
        ({"use_dora": True}, ValueError, "use_dora"),
        ({"use_qalora": True}, SchemeError, "use_qalora"),
    ],
)
def test_what_would_change_a_packed_weight_is_refused(options: Any, error: Any, message: str) -> None:
    model = nn.Sequential(QuantLinear(Quantizer("int4 group=16").quantize(torch.randn(24, 32)), torch.zeros(24)))
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, config(target_modules=["0"], **options))


@pytest.mark.parametrize("line", ["int8 token", "nvfp4", "int8 tensor static", "mxfp4", "int8 token symmetric=false"])
def test_gradients_go_through_a_rounding_of_activations(line: str) -> None:
    """As torch's own: 1 where nothing was clipped, 0 where a static range ended; the value is the rounded one."""
    quantizer = Quantizer(line)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    params = quantizer.fit(x / 2) if quantizer.static else None
    module = ActivationQuantizer(quantizer, params)
    out = module(x)
    (out * torch.arange(32.0)).sum().backward()
    assert torch.equal(out, quantizer.fake_quantize(x, params))
    want = torch.arange(32.0).expand(4, 32).clone()
    if params is not None:
        scale = float(params.scale)  # type: ignore[arg-type]
        twin = x.detach().requires_grad_()
        theirs = torch.fake_quantize_per_tensor_affine(twin, scale, 0, -127, 127)
        (theirs * torch.arange(32.0)).sum().backward()  # type: ignore[no-untyped-call]
        assert twin.grad is not None and (twin.grad != want).any()
        want = twin.grad
    assert x.grad is not None and torch.allclose(x.grad, want, rtol=1e-6)
