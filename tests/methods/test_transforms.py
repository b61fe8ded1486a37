"""Transforms: the float model computes the same, and what they promise about ranges holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, MOES, logits, save_text, save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor

import nybble
from nybble.calibration.block import BlockState
from nybble.calibration.trace import HIDDEN, BlockCall, capture_block_calls
from nybble.calibration.watch import see_channels
from nybble.calibration.window import Calibration, Window
from nybble.core.errors import ModelError, SchemeError, UsageError
from nybble.core.orthogonal import hadamard
from nybble.data import load_text, token_samples
from nybble.models.adapter import LinearFold, NormFold, adapter_for, feeding_rows
from nybble.recipe import parse_recipe
from nybble.transforms import make_transform
from nybble.transforms._folds import Channel, one_a_row, scaling
from nybble.transforms._mixing import Places

KNOWN = [family for family in FAMILIES if family != "falcon"]
SETTINGS = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def quantized(folder: Path, text: Path, transforms: list[dict[str, Any]], weights: str) -> Any:
    steps = [*transforms, {"solver": "rtn"}]
    recipe = parse_recipe({"name": "transformed", "scheme": {"weights": weights}, "steps": steps})
    # Tokens rather than text: AutoTokenizer makes some families' own tokenizers out of our small one.
    tokens = token_samples(load_text(str(text), "calibration"), tiny_tokenizer(), samples=4, seq_len=12)
    return nybble.quantize(str(folder), recipe, tokens, settings=SETTINGS)[0]


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("steps", [["smooth"], ["smooth", "equalize"], ["permute", "hadamard"]])
def test_the_float_model_stays_the_same(tmp_path: Path, family: str, steps: list[str]) -> None:
    """Weights in 24 bits: what is left is float32's own rounding, a thousandth of what int8 would do."""
    if family in ("gpt_neox",) and steps == ["smooth", "equalize"]:
        steps = ["smooth"]
    folder, text = save_tiny(tmp_path / family, family), save_text(tmp_path / "text.txt")
    transforms = [{"transform": name} for name in steps]
    try:
        model = quantized(folder, text, transforms, "float16_e5m10 channel")
    except ModelError as error:
        assert "finds no pair" in str(error) and family in ("bloom",)
        return
    plain = quantized(folder, text, [], "float16_e5m10 channel")
    exact = logits(nybble.load(folder, dtype=torch.float32)[0])
    spread = float(exact.std())
    assert float((logits(plain) - exact).abs().max()) < 0.02 * spread
    assert float((logits(model) - exact).abs().max()) < 0.02 * spread
    assert weights_changed(model, plain) or family in MOES


def made(name: str, options: dict[str, Any]) -> Any:
    return make_transform(name, options)


def weights_changed(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return any(not torch.equal(ours[name], theirs[name]) for name in ours if name in theirs)


def channel(fold: NormFold | LinearFold, largest: Tensor, before: Tensor | None, behind: list[Tensor]) -> Channel:
    rows = None if before is None else torch.arange(len(largest))
    return Channel(fold=fold, largest=largest, before=before, behind=behind, rows=rows)


def test_smooth_is_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(16, generator=generator) * 50 + 0.1
    behind = [torch.randn(8, 16, generator=generator), torch.randn(4, 16, generator=generator)]
    fold = NormFold(norm="norm", readers=("a", "b"))
    top = torch.cat(behind).abs().amax(0)
    for alpha in (0.0, 0.5, 0.8, 1.0):
        found = made("smooth", {"alpha": alpha}).factor(channel(fold, largest, None, behind))
        assert torch.allclose(found, largest**alpha / top ** (1 - alpha), rtol=1e-5)
    half = made("smooth", {}).factor(channel(fold, largest, None, behind))
    assert torch.allclose(largest / half, top * half, rtol=1e-5)  # alpha 0.5 makes both ranges alike
    power = made("smooth", {"pow2": True}).factor(channel(fold, largest, None, behind))
    assert torch.equal(power.log2(), (half.log2() + 0.5).floor())  # the nearest in the logarithm
    linear = LinearFold(first="v", second="o")
    assert made("smooth", {}).takes(fold) and not made("smooth", {}).takes(linear)
    assert made("smooth", {"linear": True}).takes(fold) and made("smooth", {"linear": True}).takes(linear)
    assert made("awq", {}).takes(linear) and not made("awq", {"linear": False}).takes(linear)
    largest[3], behind[0][:, 5], behind[1][:, 5] = 0, 0, 0
    dead = made("smooth", {}).factor(channel(fold, largest, None, behind))
    assert dead[3] == dead[5] == 1


def test_equalize_makes_ranges_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(16, 8, generator=generator), torch.randn(4, 16, generator=generator)
    first *= torch.logspace(-2, 2, 16)[:, None]
    fold = LinearFold(first="a", second="b")
    s = made("equalize", {}).factor(channel(fold, torch.ones(16), first, [second]))
    assert torch.allclose((first / s[:, None]).abs().amax(1), (second * s).abs().amax(0), rtol=1e-5)
    power = made("equalize", {"pow2": True}).factor(channel(fold, torch.ones(16), first, [second]))
    assert torch.equal(power.log2(), (s.log2() + 0.5).floor())


def test_a_row_that_several_channels_read_has_one_factor() -> None:
    """Grouped-query attention: the largest, so that no channel is left with more than its method wants."""
    rows = torch.tensor([0, 1, 0, 1, 2])
    assert one_a_row(torch.tensor([1.0, 5, 3, 2, 4]), rows).tolist() == [3, 5, 3, 5, 4]


def test_maxima_are_of_all_batches() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2))
    call = BlockCall(index=0, args=(), kwargs={}, keyword=None, start=None)
    given = [torch.tensor([[[1.0, -7, 2]]]), torch.tensor([[[-3.0, 1, 0]]])]
    found = see_channels(layer, ["0"], lambda: [(call, {HIDDEN: x}) for x in given])
    assert found["0"].largest is not None and found["0"].largest.tolist() == [3, 7, 2]
    assert found["0"].mean.tolist() == [2, 4, 1]


def test_readers_get_what_the_norm_really_lost() -> None:
    """A norm in bfloat16 rounds its new weights; the readers are multiplied by the quotient that it then has."""
    model = tiny_model("llama", torch.bfloat16)
    state = BlockState(model.model.layers[0], "model.layers.0")
    fold = adapter_for(model).norm_folds_of(state.module, model.config)[0]
    generator = torch.Generator().manual_seed(0)
    factor = torch.rand(32, generator=generator) * 5 + 0.3
    norm = f"{fold.norm}.weight"
    state.put(norm, torch.rand(32, generator=generator).bfloat16().float() + 0.5)
    before = {name: state.get(f"{name}.weight") * state.get(norm) for name in fold.readers}
    scaling(state, channel(fold, torch.ones(32), None, []), factor).apply(state)
    new = state.module.get_parameter(norm)
    assert new.dtype == torch.bfloat16 and torch.equal(state.get(norm), new.float())
    for name, wanted in before.items():
        torch.testing.assert_close(state.get(f"{name}.weight") * state.get(norm), wanted, rtol=1e-6, atol=0)


def test_smoothing_helps_where_inputs_have_outliers(tmp_path: Path) -> None:
    """Integers of 8 bits over the whole tensor: a few loud channels of the norm cost every other one its resolution."""
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:2] *= 60
            layer.post_attention_layernorm.weight[:2] *= 60
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    text = save_text(tmp_path / "text.txt")
    exact = logits(nybble.load(tmp_path / "float", dtype=torch.float32)[0])

    def lost(steps: list[dict[str, Any]]) -> float:
        targets = [r"re:.*\.(q|k|v|gate|up)_proj"]  # what reads a norm
        scheme = {"targets": targets, "weights": "int8 channel", "inputs": "int8 tensor static"}
        recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": [*steps, {"solver": "rtn"}]})
        found = nybble.quantize(str(tmp_path / "float"), recipe, str(text), settings=SETTINGS)[0]
        return float((logits(found) - exact).square().mean())

    assert lost([{"transform": "smooth"}]) < 0.5 * lost([])


def test_a_rotation_spreads_an_outlier_and_a_permutation_sorts() -> None:
    """One loud channel of a head: behind the rotation all are alike; the order is that of the magnitudes."""
    fold = LinearFold(first="v", second="o", heads=True)
    largest = torch.tensor([1.0, 8, 2, 4, 3, 1, 7, 5])
    seen = channel(fold, largest, torch.randn(8, 4), [torch.randn(4, 8)])
    config = SimpleNamespace(num_attention_heads=2)
    places = Places.of(fold, 8, config)
    assert places.rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and places.reads.tolist() == [0, 1]
    order = made("permute", {}).parameters(seen, places, 0)["order"]
    assert order.tolist() == [[1, 3, 2, 0], [2, 3, 0, 1]]
    sized = channel(fold, largest, None, [torch.tensor([[-4.0, 3, 2, 1, 1, 2, 3, 4], [0, 0, 0, 5, 0, 0, 0, 0]])])
    sized = replace(sized, rows=seen.rows)
    assert made("permute", {"by": "weights"}).parameters(sized, places, 0)["order"].tolist() == [
        [3, 0, 1, 2], [3, 2, 1, 0]
    ]  # fmt: skip
    rotation = made("hadamard", {}).parameters(seen, places, 0)["rotation"]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(4).expand(2, 4, 4))
    loud = rotation[0] @ torch.tensor([0.0, 8, 0, 0])
    torch.testing.assert_close(loud.abs(), torch.full((4,), 4.0))
    torch.testing.assert_close(hadamard(8) @ hadamard(8), torch.eye(8))  # Sylvester's are symmetric
    pairs = made("hadamard", {"block": 2}).parameters(seen, places, 0)["rotation"]
    assert (pairs[0] != 0).tolist() == torch.kron(torch.eye(2), torch.ones(2, 2)).bool().tolist()
    with pytest.raises(SchemeError, match="block=3 does not divide the 4"):
        made("hadamard", {"block": 3}).parameters(seen, places, 0)
    other = made("hadamard", {}).parameters(seen, places, 1)["rotation"]
    again = made("hadamard", {}).parameters(seen, places, 0)["rotation"]
    assert not torch.equal(rotation, other) and torch.equal(rotation, again)


def test_queries_that_share_a_value_head_share_its_order() -> None:
    fold = LinearFold(first="v", second="o", rows="value_heads", heads=True)
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    rows = feeding_rows(fold, config, 8)  # type: ignore[arg-type]
    seen = Channel(fold=fold, largest=torch.tensor([1.0, 2, 9, 2, 1, 1, 1, 5]), before=None, behind=[], rows=rows)
    places = Places.of(fold, 8, config)
    assert places.reads.tolist() == [0, 0, 1, 1]
    assert places.by_block(seen.largest).tolist() == [[9, 2], [1, 5]]


def test_permuting_helps_where_neighbours_differ(tmp_path: Path) -> None:
    """Loud and quiet channels in turn: each group of eight pays for its loudest; sorted, the loud stand together."""
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            scale = torch.ones(48)
            scale[::6] = 40  # up's rows by 40, down's columns by 1 / 40: the float model stays
            layer.mlp.up_proj.weight.mul_(scale[:, None])
            layer.mlp.down_proj.weight.div_(scale)
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    tokens = token_samples(
        load_text(str(save_text(tmp_path / "text.txt")), "calibration"), tiny_tokenizer(), samples=4, seq_len=12
    )
    exact = logits(nybble.load(tmp_path / "float", dtype=torch.float32)[0])

    def lost(steps: list[dict[str, Any]]) -> float:
        scheme = {"targets": [r"re:.*down_proj"], "weights": "int8 channel", "inputs": "int4 group=8"}
        recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": [*steps, {"solver": "rtn"}]})
        found = nybble.quantize(str(tmp_path / "float"), recipe, tokens, settings=SETTINGS)[0]
        return float((logits(found) - exact).square().mean())

    assert lost([{"transform": "permute"}]) < 0.5 * lost([])


@pytest.mark.parametrize("name", ["smooth", "equalize", "permute", "hadamard", "rotate", "ksort"])
def test_rewrites_are_functions_that_gradients_pass(name: str) -> None:
    """A rewrite reads weights and parameters and gives new weights: it can be learned, and alone changes nothing."""
    model = tiny_model("llama", torch.float32)
    tokens = {"input_ids": torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))}
    call = capture_block_calls(model, tokens)[0]
    state = BlockState(model.model.layers[0], "model.layers.0")
    calibration = Calibration(
        tokens=24, samples=2, batches=1, device=torch.device("cpu"), dtype=torch.float32, seed=0, config=model.config
    )
    window = Window([state], calibration, lambda path, order: [([call], call.start or {})], "block-0000")
    before = {key: tensor.clone() for key, tensor in state.module.state_dict().items()}
    with torch.no_grad():
        found = list(make_transform(name, {}).rewrites(window, adapter_for(model), "float"))
    assert found and all(torch.equal(before[key], tensor) for key, tensor in state.module.state_dict().items())
    with torch.enable_grad():
        for rewrite in found:
            weights = {key: state.get(key).clone().requires_grad_(True) for key in rewrite.weights}
            parameters = {
                key: p.clone().requires_grad_(True) if p.is_floating_point() else p
                for key, p in rewrite.parameters.items()
            }
            new = rewrite.function(weights, parameters)
            assert set(new) <= set(rewrite.weights)
            total: Any = torch.stack([(tensor + 1).square().sum() for tensor in new.values()]).sum()
            total.backward()
            for tensor in [*weights.values(), *parameters.values()]:
                if tensor.is_floating_point():
                    assert tensor.grad is not None and bool(tensor.grad.isfinite().all()) and bool(tensor.grad.any())


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("smooth", {"linear": True}),
        ("cfp", {"coarse": 0.0, "linear": True}),
        ("equalize", {}),
        ("permute", {}),
        ("ksort", {}),
        ("hadamard", {"block": 4}),
    ],
)
@torch.no_grad()
def test_biases_go_along(name: str, given: dict[str, Any]) -> None:
    """Every module of OPT has one; those of fresh models are zero, which hides a bias that was forgotten."""
    model = tiny_model("opt", torch.float32)
    block = model.model.decoder.layers[0].requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    tokens = {"input_ids": torch.randint(3, 50, (2, 12), generator=generator)}
    call = capture_block_calls(model, tokens)[0]
    start: Any = call.start
    state, before = BlockState(block, "model.decoder.layers.0"), call.run(block, start)[HIDDEN]
    old = {key: tensor.clone() for key, tensor in block.state_dict().items()}
    calibration = Calibration(
        tokens=24, samples=2, batches=1, device=torch.device("cpu"), dtype=torch.float32, seed=0, config=model.config
    )
    window = Window([state], calibration, lambda path, order: [([call], start)], "block-0000")
    make_transform(name, given).run(window, adapter_for(model), "float")
    assert any(not torch.equal(old[key], new) for key, new in block.state_dict().items() if key.endswith("bias"))
    torch.testing.assert_close(call.run(block, start)[HIDDEN], before, rtol=1e-4, atol=1e-4 * float(before.std()))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown transform 'smoth'. Did you mean 'smooth'"):
        make_transform("smoth", {})
    with pytest.raises(SchemeError, match=r"alpha=1\.5 is a share"):
        make_transform("smooth", {"alpha": 1.5})
    with pytest.raises(SchemeError, match="no option 'alpah'"):
        make_transform("smooth", {"alpah": 0.5})
    with pytest.raises(SchemeError, match=r"transform 'smooth' can't come after solver 'rtn': .*codes by then"):
        parse_recipe(
            {"name": "x", "scheme": {"weights": "int8"}, "steps": [{"solver": "rtn"}, {"transform": "smooth"}]}
        )
    folder = save_tiny(tmp_path / "falcon", "falcon")
    with pytest.raises(ModelError, match=r"'smooth' finds no pair.*no adapter"):
        quantized(folder, save_text(tmp_path / "text.txt"), [{"transform": "smooth"}], "int8 channel")
