"""OmniQuant, whole: LET and LWC learned together, folded away, saved, and better than what it is made of."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import save_tiny, tiny_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import nybble
from nybble.core.errors import ModelError, SchemeError
from nybble.learned import ACTIVATIONS
from nybble.learned.ste import Ste, following
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe, parse_recipe
from nybble.reconstruction import engine
from nybble.reconstruction.transforming import transformed
from nybble.walk import lane as walk_lane

W4A4 = {"weights": "int4 channel symmetric=false", "inputs": "int4 token symmetric=false"}
LET: dict[str, Any] = {"reconstruction": "mse", "block": "let", "steps": 24, "rates": {"transform": 0.005}}
LOUD = 20.0
NORMS = {
    "llama": (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    "opt": (
        ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("final_layer_norm", ("fc1",)),
    ),
}  # fmt: skip


def tokens(seed: int, samples: int = 64) -> Tensor:
    return torch.randint(3, 300, (samples, 16), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def planted(family: str = "llama", **changes: Any) -> Any:
    """A model two of whose channels are loud in front of attention and MLP; of layer norms they are shifted too."""
    changes = {"attention_bias": False, **changes} if family == "llama" else changes
    model = tiny_model(family, dtype=torch.float32, **changes)
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers if family == "llama" else model.model.decoder.layers:
        for name, readers in NORMS[family]:
            norm, loud = layer.get_submodule(name), torch.randperm(32, generator=generator)[:2]
            norm.weight[loud] *= LOUD
            if getattr(norm, "bias", None) is not None:
                norm.bias[loud] += 0.75 * LOUD
            for reader in readers:
                layer.get_submodule(reader).weight[:, loud] /= LOUD
    return model


@cache
def exact(family: str) -> nn.Module:
    found: nn.Module = planted(family)
    return found


def quantized(
    steps: list[dict[str, Any]], family: str = "llama", scheme: dict[str, Any] | None = None, **more: Any
) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    recipe = parse_recipe({"name": "x", "scheme": scheme or W4A4, "steps": steps})
    settings = nybble.Settings(samples=64, seq_len=16, batch=16, dtype=torch.float32)
    return nybble.quantize(more.get("model") or planted(family), recipe, tokens(0), settings=settings)


@torch.no_grad()
def error(model: nn.Module, family: str = "llama") -> float:
    """Of the last block's output, relative, on tokens that calibration has not seen."""
    one, other = (m(tokens(1), output_hidden_states=True).hidden_states[-1] for m in (exact(family), model))
    return float((one - other).square().sum() / one.square().sum())


def recipe_steps(**changes: Any) -> list[dict[str, Any]]:
    steps = load_recipe("omniquant").to_dict()["steps"]
    steps = [{key: value for key, value in step.items() if key != "quick"} for step in steps]
    return [{**step, **changes} if "reconstruction" in step else step for step in steps]


@pytest.mark.parametrize("family", NORMS)
def test_better_than_what_it_is_made_of_where_channels_are_loud(family: str) -> None:
    """W4A4, on tokens that nothing has seen: the recipe with a tenth of its steps."""
    model, report = quantized(recipe_steps(steps=24, every=8), family)
    nearest, smooth = (
        error(quantized(steps, family)[0], family) for steps in ([{"solver": "rtn"}], [{"transform": "smooth"}])
    )
    clipped = recipe_steps(steps=6, every=3, block=None, rates={"clip": 0.04})
    found = error(model, family)
    assert found < 0.97 * smooth and found < 0.25 * nearest
    assert found < 0.25 * error(quantized(clipped, family)[0], family)
    rows = [row for row in report.layers if row.weights]
    assert all((row.learned or {})["windows"][0]["after"] < 0.5 * (row.learned or {})["windows"][0]["before"]
               for row in rows)  # fmt: skip
    said = " ".join(note for row in rows for note in row.notes)
    assert ("norm -> self_attn.q_proj scaled and shifted" in said) == (family == "opt")
    assert ("norm -> self_attn.q_proj scaled (no biases to shift)" in said) == (family == "llama")
    assert all(row.error is not None and row.error < 0.1 for row in rows)  # of the weights that were really rounded


def test_learning_lowers_what_it_begins_with() -> None:
    """The window's own loss, of LET alone: below its start, which is far below round-to-nearest's."""
    starts: dict[str, float] = {}
    for name, rate in (("start", 0.0), ("learned", 0.005)):
        step = {**LET, "steps": 16 if rate else 1, "rates": {"transform": rate}, "keep": "best", "every": 8}
        _, report = quantized([step], model=planted(num_hidden_layers=1))
        (entry,) = (report.layers[0].learned or {})["windows"]
        starts[name] = entry["after"]
    assert starts["learned"] < 0.97 * starts["start"] < 0.2 * entry["before"]


@pytest.mark.parametrize("family", NORMS)
def test_nothing_is_left_at_run_time(family: str, tmp_path: Path) -> None:
    """The folder holds what round-to-nearest's holds, tensor by tensor, and loads to the same numbers."""
    folder = tmp_path / family
    planted(family).save_pretrained(folder)
    settings = nybble.Settings(samples=64, seq_len=16, batch=16)
    shapes = {}
    for name, steps in (("rtn", [{"solver": "rtn"}]), ("let", recipe_steps(steps=4, every=2))):
        recipe = parse_recipe({"name": name, "scheme": W4A4, "steps": steps})
        out, _ = nybble.quantize(folder, recipe, tokens(0), out=tmp_path / name, settings=settings)
        stored = load_file(Path(out) / "model.safetensors")
        shapes[name] = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items()}
    assert shapes["let"] == shapes["rtn"]
    memory, _ = nybble.quantize(folder, recipe, tokens(0), settings=settings)
    loaded, _ = nybble.load(tmp_path / "let")
    norms = [name for name in stored if "layer_norm" in name or "layernorm" in name]
    before = load_file(folder / "model.safetensors")
    assert any(not torch.equal(stored[name].float(), before[name].bfloat16().float()) for name in norms)
    with torch.no_grad():
        assert torch.equal(loaded(tokens(1)).logits, memory(tokens(1)).logits)


def test_what_is_judged_is_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's output with its twins in eval mode and with what they settle to: bit for bit; gradients reach all."""
    seen: dict[str, Any] = {}
    inside: Any = engine
    train = inside.train

    def spy(window: Any, *args: Any) -> Any:
        found = train(window, *args)
        if window.part == "window-0000":
            change = transformed(window.block)
            assert change is not None
            seen["parameters"] = [p.detach().clone() for p in change.moving.parameters()]
            seen["state"], seen["window"] = window.block, window
        return found

    say = inside._say

    def after(window: Any, *args: Any) -> None:
        say(window, *args)
        if window.part == "window-0000":
            calls, given = next(iter(window.inputs("quantized")))
            seen["judged"] = window.run(calls, given, "quantized")["hidden"]
            seen["float"] = window.run(calls, given, "float")["hidden"]

    monkeypatch.setattr(engine, "train", spy)
    monkeypatch.setattr(engine, "_say", after)
    lane: Any = walk_lane
    settled = lane.settle_twins

    def settling(state: Any) -> None:
        settled(state)
        if state is seen["state"]:
            window = seen["window"]
            calls, given = next(iter(window.inputs("quantized")))
            seen["stored"] = window.run(calls, given, "quantized")["hidden"]
            seen["folded"] = window.run(calls, given, "float")["hidden"]
            with state.as_it_came():
                seen["came"] = window.run(calls, given, "float")["hidden"]

    monkeypatch.setattr(lane, "settle_twins", settling)
    with torch.no_grad():
        quantized(recipe_steps(steps=6, every=2), "opt")
    assert seen["parameters"] and all(bool(p.any()) for p in seen["parameters"])
    assert torch.equal(seen["judged"], seen["stored"])
    assert torch.equal(seen["came"], seen["float"]) and not torch.equal(seen["folded"], seen["float"])
    torch.testing.assert_close(seen["folded"], seen["float"], rtol=1e-3, atol=1e-4 * float(seen["float"].std()))


READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.out_proj", "fc1")  # whose rows LET leaves as they are


def float_products(
    state: Any, samples: dict[str, Tensor], values: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Of the inputs of READERS with their float weights, as the block has them or among ``values``."""
    found = {}
    for target in (target for target in state.targets if target.name in READERS):
        change = transformed(state)
        weight = state.matrix(target) if change is None or values is None else change.matrix(target, values)
        bias = (values or {}).get(f"{target.name}.bias", state.get(f"{target.name}.bias"))
        found[target.name] = (samples[target.name].float() @ weight.float().mT + bias).detach()
    return found


def assert_same_products(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(READERS)
    for name, product in found.items():
        torch.testing.assert_close(product, wanted[name], rtol=1e-3, atol=1e-3 * float(wanted[name].std()))


def test_the_kept_inputs_are_folded_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block's records keep of its inputs gives, in float, what it gave before."""
    lane: Any = walk_lane
    settle, seen = lane.settle_twins, list[Any]()

    def settling(state: Any) -> None:
        samples = {name: record.sample.clone() for name, record in state.records.items()}
        before = float_products(state, samples)
        settle(state)
        kept = {name: record.sample for name, record in state.records.items()}
        assert all(not torch.allclose(kept[name], samples[name], rtol=0.1) for name in READERS)
        seen.append((float_products(state, kept), before))

    monkeypatch.setattr(walk_lane, "settle_twins", settling)
    quantized([{**LET, "steps": 2, "rates": {"transform": 0.1}}], model=planted("opt", num_hidden_layers=1))
    ((found, wanted),) = seen
    assert_same_products(found, wanted)


def test_parts_of_inputs_begin_with_what_the_transform_makes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is far from what came where LET begins with the paper's factors."""
    inside: Any = engine
    put, begin, given, seen = inside.put_twins, Ste.begin, list[Tensor](), list[Any]()

    def putting(state: Any, targets: Any, options: Any) -> None:
        put(state, targets, options)
        change = transformed(state)
        assert change is not None
        begun = dict(zip((target.name for target in targets), given, strict=True))
        samples = {name: record.sample for name, record in state.records.items()}
        assert all(not torch.allclose(begun[name], samples[name].float(), rtol=0.1) for name in READERS)
        seen.append((float_products(state, begun, change.values()), float_products(state, samples)))

    def beginning(self: Ste, quantizer: Quantizer, x: Tensor, start: Any, side: str) -> Any:
        if side == ACTIVATIONS:
            given.append(x)
        return begin(self, quantizer, x, start, side)

    monkeypatch.setattr(engine, "put_twins", putting)
    monkeypatch.setattr(Ste, "begin", beginning)
    quantized([{**LET, "inputs": "ste", "steps": 1}], model=planted("opt", num_hidden_layers=1))
    ((found, wanted),) = seen
    assert_same_products(found, wanted)


def test_queries_and_keys_where_they_are_rounded() -> None:
    """Loud channels of the queries, whose rows are rounded together: their factors move, and the window loses less."""
    made = {"targets": ["re:.*[qk]_proj"], "weights": "int8 channel", "outputs": "int4 token"}

    def model() -> Any:
        made = tiny_model("llama", dtype=torch.float32, num_hidden_layers=1)
        with torch.no_grad():
            for layer in made.model.layers:
                for name, factor in (("q_proj", 12.0), ("k_proj", 1 / 12)):
                    linear = layer.self_attn.get_submodule(name)
                    for row in (1, 5):  # a pair of the rotary embedding
                        linear.weight[row::8] *= factor
                        linear.bias[row::8] *= factor
        return made

    step = {**LET, "steps": 24, "rates": {"transform": 0.1}, "keep": "best", "every": 8}
    _, report = quantized([step], scheme={"rules": [made]}, model=model())
    rows = {row.name: row for row in report.layers}
    row = rows["model.layers.0.self_attn.q_proj"]
    assert any("self_attn.q_proj <-> self_attn.k_proj scaled" in note for note in row.notes)
    (entry,) = (row.learned or {})["windows"]
    assert entry["kept"] != "start" and entry["after"] < 0.8 * entry["before"]

    products = {"targets": ["Attention"], "matmuls": "int8 tensor"}
    rules = [products, {"targets": ["Linear"], "weights": "int8 channel"}]
    _, report = quantized([{**LET, "steps": 2}], scheme={"rules": rules}, model=model())
    (notes,) = [row.notes for row in report.layers if row.name.endswith("k_proj")]
    assert any("self_attn.q_proj <-> self_attn.k_proj scaled" in note for note in notes)


def test_weights_alone_are_clipped_alone_in_a_llama() -> None:
    """As the paper has it: with nothing to shift and no rounded inputs LET has no place, so the bytes are LWC's."""
    scheme = {"weights": "int3 channel symmetric=false"}
    both = recipe_steps(steps=6, every=3)
    ours, report = quantized(both, scheme=scheme)
    alone, _ = quantized(recipe_steps(steps=6, every=3, block=None, rates={"clip": 0.01}), scheme=scheme)
    theirs = alone.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.state_dict().items())
    assert any("transform let: finds nothing to rescale here" in note for note in report.layers[0].notes)
    shifted, report = quantized(both, "opt", scheme=scheme)
    assert any("scaled and shifted" in note for note in report.layers[0].notes)
    assert error(shifted, "opt") < error(quantized([{"solver": "rtn"}], "opt", scheme=scheme)[0], "opt")


def test_an_encoder() -> None:
    """Norms behind the sums fold nowhere: values and the output layer are the one place."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    make: Any = BertModel
    torch.manual_seed(0)
    model = make(BertConfig(vocab_size=300, **sizes)).eval()
    given = {"input_ids": tokens(0, 8), "attention_mask": torch.ones(8, 16, dtype=torch.long)}
    recipe = parse_recipe({"name": "x", "scheme": W4A4, "steps": recipe_steps(steps=4, every=2)})
    settings = nybble.Settings(samples=8, seq_len=16, batch=4)
    _, report = nybble.quantize(model, recipe, given, settings=settings)
    notes = {row.name.split("layer.0.")[-1]: " ".join(row.notes) for row in report.layers if "layer.0." in row.name}
    where = "attention.self.value -> attention.output.dense scaled and shifted"
    assert where in notes["attention.self.value"] and where in notes["attention.output.dense"]
    assert "finds nothing to rescale here" in notes["intermediate.dense"]


@pytest.mark.parametrize(
    "scheme",
    [
        {"weights": "nvfp4", "inputs": "nvfp4"},
        {"weights": "mxfp4 group=16", "inputs": "mxfp4 group=16"},
        {"weights": "int4 group=8", "inputs": "int8 tensor static"},
        {"weights": "float4_e2m1fn channel scale=mse", "inputs": "float8_e4m3fn token"},
    ],
)
def test_any_format(scheme: dict[str, str]) -> None:
    """LET alone under each; a window never ends above where round-to-nearest left it."""
    _, report = quantized([{**LET, "steps": 4}], scheme=scheme)
    for row in report.layers:
        for entry in (row.learned or {})["windows"]:
            assert entry["after"] <= entry["before"] and not entry["diverged"]


def test_scales_of_any_rule_follow_the_range() -> None:
    """Doubling a block doubles what its largest element and its scale gain: the gradient along x is x_hat itself."""
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    for line in ("int4 token", "int4 token symmetric=false", "mxfp4 group=16", "float4_e2m1fn group=8 scale=mse"):
        quantizer, along = Quantizer(line), torch.ones((), requires_grad=True)
        grown = x * along
        params = following(quantizer, grown)
        found = quantizer.soft(grown, params, lambda y, grid: grid.nearest(y.detach()) + y - y.detach())
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        (found * upstream).sum().backward()  # type: ignore[no-untyped-call]
        assert along.grad is not None
        torch.testing.assert_close(along.grad, (quantizer.fake_quantize(x) * upstream).sum(), rtol=1e-4, atol=1e-4)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"learns nothing without a part: name one for weights, inputs or block"):
        quantized([{"reconstruction": "mse"}])
    for part in ("adaround", "block-ap", "lora-rounding"):
        with pytest.raises(SchemeError, match=rf"{part} holds the weight .* block=let changes it .* weights: clip"):
            quantized([{**LET, "weights": part}])
    with pytest.raises(SchemeError, match=r"no learned part has the group 'clip'; there are default, transform"):
        quantized([{**LET, "rates": {"clip": 0.1}}])
    falcon = save_tiny(tmp_path / "falcon", "falcon")
    recipe = parse_recipe({"name": "x", "scheme": W4A4, "steps": [LET]})
    with pytest.raises(
        (SchemeError, ModelError), match=r"learns a transform alone, and finds no channels .*no adapter"
    ):
        nybble.quantize(falcon, recipe, tokens(0, 4), settings=nybble.Settings(samples=4, seq_len=16, batch=2))
