"""PTQ1.61, whole: the mask, what is stored and how many bits that is, learned scales, preprocessing, better loss."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.tiny import save_tiny, tiny_model
from torch import Tensor, nn
from torch.nn import functional

import nybble
from nybble.calibration.error import relative_error
from nybble.core.errors import LearningError, SchemeError
from nybble.learned import make_part
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor, from_spec
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.outer_scaled import OuterScaled
from nybble.qtensor.split import SplitQTensor, pack_members
from nybble.quantizer import Quantizer
from nybble.recipe import Recipe, load_recipe, parse_recipe
from nybble.solvers import Sizes, Solved, Stats, Weight, make_solver
from nybble.training.steps import main_output, make_train_step
from nybble.training.steps.restorative_lora import Adapted, RestorativeLora

BINARY = "binary channel scale=mean(offset=true) scale_format=float16 offset_format=float16"
FOUR = "int4 channel symmetric=false scale_format=float16"
EIGHT = "uint8 tensor scale=minmax(offset=true)"
MASK: dict[str, Any] = {"share": 0.2, "count": "down", "keep": FOUR, "by": "largest"}
LOUD = (3, 17, 40, 41, 59)


def matrix(rows: int = 48, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int = 64, loud: tuple[int, ...] = LOUD) -> Tensor:
    x = torch.randn(400, columns, generator=torch.Generator().manual_seed(9))
    x[:, list(loud)] *= 15
    return x


def stats(x: Tensor) -> Stats:
    sizes = Sizes(largest=x.abs().amax(0), mean=x.abs().mean(0))
    return Stats(second_moment=x.T @ x / len(x), sizes=sizes)


def solve(w: Tensor, x: Tensor, line: str = BINARY, **options: Any) -> Solved:
    solver = make_solver("outlier-columns", {**MASK, **options})
    (found,) = solver.solve([Weight(name="w", matrix=w, quantizer=Quantizer(line))], stats(x))
    return found


def split(w: Tensor, x: Tensor, line: str = BINARY, **options: Any) -> SplitQTensor:
    found = solve(w, x, line, **options).weight
    assert isinstance(found, SplitQTensor)
    return found


# ------------------------------------------------------------------------------------------------ the mask
@pytest.mark.parametrize("by", ["largest", "mean"])
def test_the_mask_is_numpys(by: str) -> None:
    """int(0.2 m) columns, the largest first, equal ones by their place; rows in any order."""
    x = inputs()
    x[:, 20] = x[:, 10]  # a tie
    size = {"largest": np.abs(x.numpy()).max(0), "mean": np.abs(x.numpy()).mean(0)}[by]
    want = sorted(np.argsort(-size, kind="stable")[: int(0.2 * 64)].tolist())
    rest, kept = split(matrix(), x, by=by).slices()
    assert kept.tolist() == want and set(LOUD) <= set(want)
    assert rest.tolist() == [column for column in range(64) if column not in want]
    assert split(matrix().flip(0), x, by=by).slices()[1].tolist() == want


def test_calibration_sees_the_largest_input_of_every_layer() -> None:
    """In a model: q, k and v have one mask, that of max|x| over all tokens that reach them; experts, of their own."""
    for family in ("llama", "mixtral"):
        model, ids = tiny_model(family, dtype=torch.float32), tokens(0, 6)
        seen: dict[str, Tensor] = {}
        name = "model.layers.0.self_attn.q_proj"
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.update(x=args[0].detach())
        )
        model(ids)
        handle.remove()
        want = np.argsort(-seen["x"].abs().amax((0, 1)).numpy(), kind="stable")[: int(0.2 * 32)]
        scheme = {"targets": ["Experts", "Linear"] if family == "mixtral" else ["Linear"], "weights": BINARY}
        made = parse_recipe({"name": "mask", "scheme": scheme, "steps": [{"solver": "outlier-columns", **MASK}]})
        quantized, _ = nybble.quantize(model, made, ids, settings=SETTINGS)
        found = [packed(quantized, f"model.layers.0.self_attn.{p}_proj").slices()[1].tolist() for p in "qkv"]
        assert found == [sorted(want.tolist())] * 3
    masks = [p.qtensor() for p in quantized.model.layers[0].mlp.experts.gate_up_proj.experts]
    assert len({tuple(m.slices()[1].tolist()) for m in masks if isinstance(m, SplitQTensor)}) > 1


def test_at_the_start_it_is_plain_rounding_of_both_parts() -> None:
    w, x = matrix(), inputs()
    w[0, :30] = 0
    found = split(w, x)
    rest, kept = found.slices()
    dense = found.dequantize()
    centre = w[:, rest].double().mean(1, keepdim=True)
    size = (w[:, rest] - centre).abs().mean(1, keepdim=True)
    sign = torch.where(w[:, rest] - centre.half() >= 0, 1.0, -1.0)  # no third level: 0 counts as +1
    want = size.half().float() * sign + centre.half().float()
    assert torch.equal(dense[:, rest], want.float())
    for row in dense[:, rest]:
        assert len(row.unique()) == 2
    low, high = w[:, kept].amin(1, keepdim=True).clamp(max=0), w[:, kept].amax(1, keepdim=True).clamp(min=0)
    assert torch.equal(dense[:, kept], Quantizer(FOUR).quantize(w[:, kept]).dequantize())
    assert (dense[:, kept] - w[:, kept]).abs().max() <= ((high - low) / 15).max() * 0.51
    whole = split(w, x, span="whole").dequantize()[:, kept]
    assert torch.equal(whole, Quantizer(FOUR).quantize(w, Quantizer(FOUR).fit(w)).dequantize()[:, kept])
    assert not torch.equal(whole, dense[:, kept])


def test_loud_inputs_in_more_bits_pay() -> None:
    """The magnitude mask before a random one of the same bits before one bit for all."""
    w, x = matrix(), inputs()
    second = x.T @ x / len(x)
    chosen = split(w, x)
    random = split(w, inputs(loud=(0, 1, 2, 4, 5)))  # columns that are as loud as any elsewhere
    pure = Quantizer(BINARY).quantize(w)
    errors = [relative_error(w, each.dequantize(), second) for each in (chosen, random, pure)]
    assert errors[0] < 0.5 * errors[1] and errors[1] < errors[2]
    assert chosen.nbytes() == random.nbytes()
    assert torch.equal(solve(w, x, share=0.0).weight.dequantize(), pure.dequantize())


# ------------------------------------------------------------------------------------------------ bits
def layer(rows: int, columns: int, merge: bool, eight: bool, real: bool = False) -> QTensor:
    """A layer as the recipe stores it; on the meta device unless it is wanted for real."""
    line = (
        BINARY
        if not eight
        else f"binary channel scale=mean(offset=true) scale_format=({EIGHT}) offset_format=({EIGHT})"
    )
    keep = FOUR if not eight else f"int4 channel symmetric=false scale_format=({EIGHT})"
    part = make_part("binarization-scales", {"merge": merge, **({"factors": EIGHT} if eight else {})})
    if real:
        w = matrix(rows, columns)
        base = split(w, inputs(columns), line, keep=keep)
        learned = part.make(Quantizer(line), w[:, base.slices()[0]], base.parts[0])  # type: ignore[arg-type]
        settled = learned.settle(w[:, base.slices()[0]])
        assert isinstance(settled, QTensor)
        return SplitQTensor(base.shape, 1, base.index, (settled, base.parts[1]))
    few = columns // 5
    w = torch.empty(rows, columns, device="meta")
    factors = [part.stored(torch.empty(1, columns - few, device="meta"))]  # type: ignore[attr-defined]
    factors += [] if merge else [part.stored(torch.empty(rows, 1, device="meta"))]  # type: ignore[attr-defined]
    rest = OuterScaled(Quantizer(line).quantize(w[:, few:]), tuple(factors))
    members = pack_members(torch.empty(columns, dtype=torch.uint8, device="meta"), 2)
    return SplitQTensor((rows, columns), 1, members, (rest, Quantizer(keep).quantize(w[:, :few])))


SMOLLM2 = [(576, 576), (576, 576), (192, 576), (192, 576), (1536, 576), (1536, 576), (576, 1536)]


@pytest.mark.parametrize(
    ("merge", "eight", "wide", "narrow", "square"),
    [(False, False, 1.621, 1.723, 1.747), (True, False, 1.617, 1.699, 1.719), (True, True, 1.609, 1.653, 1.663)],
)
def test_bits_as_stored(merge: bool, eight: bool, wide: float, narrow: float, square: float) -> None:
    """The accounting of the method: 68 / m + 17 / n with everything, less with merged rows, less in 8 bits.

    Scales in 8 bits have a range of their own, 64 bits for each of four vectors.
    """
    real = layer(576, 576, merge, eight, real=True)
    ranges = 4 * 64 if eight else 0
    m, n, few = 576, 576, 115
    rows = (28 if eight else 52) if merge else 68
    exact = n * (m - few) + 4 * n * few + rows * n + (8 if eight else 16) * (m - few) + m
    assert abs(8 * real.nbytes() - exact - ranges) < 8 * 4  # each of the packed tensors ends at a byte
    assert real.nbytes() == 8 * real.nbytes() / 8 == sum(real.bytes_by_role().values())
    assert real.bits_per_element() <= square + 0.001
    if real.nbytes() != layer(576, 576, merge, eight).nbytes():
        raise AssertionError("a layer on the meta device is not what is stored")
    assert layer(4096, 4096, merge, eight).bits_per_element() <= wide + 0.0005 <= 1.63
    layers = [layer(rows, columns, merge, eight) for rows, columns in SMOLLM2]
    bits = sum(8 * q.nbytes() for q in layers) / sum(rows * columns for rows, columns in SMOLLM2)
    assert bits <= narrow + 0.0025
    assert bits <= (1.66 if eight else 1.73)


def test_the_packed_layer_is_its_dequantized_one() -> None:
    w, x = matrix(), inputs()[:7]
    base = split(w, inputs())
    part = make_part("binarization-scales", {}).make(Quantizer(BINARY), w[:, base.slices()[0]], base.parts[0])  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(4)))
    settled = part.settle(w[:, base.slices()[0]])
    assert isinstance(settled, OuterScaled)
    q = SplitQTensor(base.shape, 1, base.index, (settled, base.parts[1]))
    assert torch.equal(QuantLinear(q, None)(x), functional.linear(x, q.dequantize()))
    again = from_spec(q.spec(), q.tensors())
    again.validate()
    assert torch.equal(again.dequantize(), q.dequantize())
    # two values a row, once the columns' factors are taken off; salient columns have none
    columns = settled.factors[0].float() if isinstance(settled.factors[0], Tensor) else None
    assert columns is not None and isinstance(settled.base, BlockQTensor)
    assert all(len(row.unique()) == 2 for row in settled.base.dequantize())
    assert torch.equal(q.dequantize()[:, base.slices()[1]], base.dequantize()[:, base.slices()[1]])


@pytest.mark.parametrize(
    ("line", "keep"),
    [
        ("ternary channel scale=mean(offset=true)", "int4 channel symmetric=false"),
        (BINARY, "float4_e2m1fn channel scale_format=float16"),
        ("int2 group=4 symmetric=false", "nvfp4"),
        ("binary flat=16 scale=mean", "bfloat16"),
    ],
)
def test_other_formats_in_both_parts(line: str, keep: str) -> None:
    """Learned and packed, and learning lowers the error of what comes out."""
    torch.set_num_threads(1)
    model, ids = tiny_model(dtype=torch.float32), tokens(0, 8)
    steps = recipe().to_dict()["steps"][2:4]
    steps[0] |= {"keep": keep, "share": 0.25}
    steps[1] |= {"steps": 12, "rates": {"scales": 0.01, "factors": 0.02}}
    made = parse_recipe({"name": "made", "scheme": {"weights": line}, "steps": [without_quick(s) for s in steps]})
    found, report = nybble.quantize(model, made, ids, settings=SETTINGS)
    packs = [m.qtensor() for m in found.modules() if isinstance(m, Packed)]
    assert all(isinstance(q, SplitQTensor) for q in packs)
    assert any(isinstance(q.parts[0], OuterScaled) for q in packs if isinstance(q, SplitQTensor))
    windows = [row.learned["windows"][0] for row in report.layers if row.learned and row.learned.get("windows")]
    assert all(w["after"] <= w["before"] for w in windows) and any(w["after"] < w["before"] for w in windows)


# ------------------------------------------------------------------------------------------------ learned scales
def tokens(seed: int, samples: int = 16) -> Tensor:
    return torch.randint(3, 300, (samples, 16), generator=torch.Generator().manual_seed(seed))


SETTINGS = nybble.Settings(samples=16, seq_len=16, batch=4, dtype=torch.float32)


def without_quick(step: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "quick"}


def recipe(train: dict[str, Any] | None = None, **learn: Any) -> Recipe:
    """The recipe with a few steps; preprocessing is off unless asked for."""
    found = load_recipe("ptq1.61").to_dict()
    for step in found["steps"]:
        if "train" in step:
            step |= {"steps": 0} if train is None else train
        if "reconstruction" in step:
            step |= {"steps": 24, "rates": {"scales": 0.01, "factors": 0.02}, **learn}
    found["steps"] = [without_quick(step) for step in found["steps"]]
    return parse_recipe(found)


def losses(**learn: Any) -> tuple[float, float]:
    """Of the only window, before and after."""
    _, report = nybble.quantize(tiny_model(**ONE), recipe(**learn), tokens(0), settings=SETTINGS)
    found = {w["window"]: w for row in report.layers if row.learned for w in row.learned["windows"]}
    first = found[min(found)]
    return first["before"], first["after"]


def test_learned_scales_lower_the_block_s_error() -> None:
    """All three before the blocks' own alone before none."""
    torch.set_num_threads(1)
    before, every = losses()
    again, scales = losses(rates={"scales": 0.01, "factors": 0.0})
    assert again == before
    assert every < scales < before
    assert every < 0.9 * before


def test_signs_stay_and_only_scales_have_gradients() -> None:
    w = matrix()
    learned = make_part("binarization-scales", {}).make(Quantizer(BINARY), w)
    assert {name: [tuple(p.shape) for p in group] for name, group in learned.groups().items()} == {
        "scales": [(48, 1)], "factors": [(48, 1), (1, 64)],
    }  # fmt: skip
    x = w.clone().requires_grad_()
    learned.train()(x).square().sum().backward()
    assert x.grad is None
    before = learned.settle(w)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.mul_(1.2)
    after = learned.settle(w)
    assert isinstance(before, OuterScaled) and isinstance(after, OuterScaled)
    assert isinstance(before.base, BlockQTensor) and isinstance(after.base, BlockQTensor)
    assert torch.equal(before.base.codes, after.base.codes)
    torch.testing.assert_close(after.dequantize(), before.dequantize() + after.dequantize() - before.dequantize())
    scale = w.sub(w.mean(1, keepdim=True)).abs().mean(1, keepdim=True)
    want = 1.2 * 1.2 * (1.2 * scale * (w - w.mean(1, keepdim=True)).sign() + w.mean(1, keepdim=True))
    torch.testing.assert_close(after.dequantize(), want, rtol=2e-3, atol=2e-3)  # float16 scales and factors


def test_a_solvers_codes_are_kept() -> None:
    """GPTQ's signs, which are not the weights' own: with rates of 0 what it found is what is there."""
    torch.set_num_threads(1)
    line = "binary channel scale=mean"
    gptq = {"solver": "gptq"}
    learn = {"reconstruction": "mse", "weights": "binarization-scales", "steps": 1}
    models = []
    for steps in ([gptq], [gptq, {**learn, "rates": {"scales": 0.0, "factors": 0.0}}]):
        made = parse_recipe({"name": "made", "scheme": {"weights": line}, "steps": steps})
        models.append(nybble.quantize(tiny_model(dtype=torch.float32), made, tokens(0), settings=SETTINGS)[0])
    names = [n for n, m in models[0].named_modules() if isinstance(m, Packed)]
    assert names
    for name in names:
        one, other = (m.get_submodule(name).qtensor().dequantize() for m in models)
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------ preprocessing
TRAIN: dict[str, Any] = {"steps": 2, "rank": 4, "rate": 1e-2, "held": 0}
FEW: dict[str, Any] = {"steps": 2}
ONE: dict[str, Any] = {"num_hidden_layers": 1, "dtype": torch.float32}


def packed(model: nn.Module, name: str) -> Any:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Packed)
    return weight.qtensor()


def test_a_zero_adapter_gives_the_first_pass_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with another rate other weights, of the original shapes, without an adapter."""
    from nybble.pipelines import prepared

    torch.set_num_threads(1)
    first, _ = nybble.quantize(tiny_model(**ONE), recipe(**FEW), tokens(0, 8), settings=SETTINGS)
    seen: list[dict[str, Tensor]] = []
    real = prepared._with_weights

    def spy(job: Any, found: dict[str, Tensor]) -> Any:
        seen.append(found)
        return real(job, found)

    monkeypatch.setattr(prepared, "_with_weights", spy)
    for rate in (1e-30, 1e-2):
        made = recipe({**TRAIN, "rate": rate}, **FEW)
        nybble.quantize(tiny_model(**ONE), made, tokens(0, 8), settings=SETTINGS)
    zero, trained = seen
    layers = {n for n, m in first.named_modules() if isinstance(m, QuantLinear)}
    assert {name.removesuffix(".weight") for name in zero} == layers
    shapes = {name: p.shape for name, p in tiny_model(**ONE).named_parameters()}
    for name, tensor in zero.items():
        base = packed(first, name.removesuffix(".weight")).dequantize()
        torch.testing.assert_close(tensor, base, rtol=0, atol=1e-25)  # what the rate of 1e-30 came to
        assert tensor.shape == shapes[name]
        assert torch.equal(trained[name], base) == name.endswith("o_proj.weight")  # which has no adapter


def test_dropout_leaves_features_out_in_training_alone() -> None:
    """What is judged, and merged in the end, is the whole of both matrices."""
    base = Packed(Quantizer("int4 channel").quantize(torch.randn(8, 16)), torch.float32)
    adapted = Adapted(base, 4, 8.0, 0.5, torch.Generator().manual_seed(0))
    adapted.b.data.normal_()
    with torch.no_grad():
        assert torch.equal(adapted(torch.float32), adapted.merged())
    with torch.enable_grad():
        added = (adapted(torch.float32) - base.qtensor().dequantize()).detach()
    left_out = (added == 0).all(0)
    assert 0 < int(left_out.sum()) < 16
    torch.testing.assert_close(added[:, ~left_out], 2 * adapted.product().detach()[:, ~left_out])


def test_off_is_the_single_pass(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    source, ids = str(save_tiny(tmp_path / "model", **ONE)), tokens(0, 8)
    off = recipe(**FEW)
    without = replace(off, steps=tuple(step for step in off.steps if step.kind != "train"))
    found = [nybble.quantize(source, each, ids, settings=SETTINGS)[0].state_dict() for each in (off, without)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    on = nybble.quantize(source, recipe(TRAIN, **FEW), ids, settings=SETTINGS)[0].state_dict()
    assert on.keys() == found[0].keys()
    assert any(not torch.equal(on[name], found[0][name]) for name in on)


def test_adapters_that_gain_nothing_on_samples_held_back_are_not_kept(tmp_path: Path) -> None:
    """The single pass then, in memory and from a folder; with ``held: 0`` whatever they came to."""
    torch.set_num_threads(1)
    ids = tokens(0, 8)
    source = str(save_tiny(tmp_path / "model", **ONE))
    wild = {**TRAIN, "rate": 0.3}
    made = {held: recipe({**wild, "held": held}, **FEW) for held in (0, 0.25)}
    off = nybble.quantize(source, recipe(**FEW), ids, settings=SETTINGS)[0].state_dict()
    kept, judged = (nybble.quantize(source, each, ids, settings=SETTINGS)[0].state_dict() for each in made.values())
    assert all(torch.equal(judged[name], off[name]) for name in off)
    assert any(not torch.equal(kept[name], off[name]) for name in off)
    recipes = (recipe(**FEW), made[0.25])
    memory = [nybble.quantize(tiny_model(**ONE), each, ids, settings=SETTINGS)[0] for each in recipes]
    for name, tensor in memory[0].state_dict().items():
        assert torch.equal(memory[1].state_dict()[name], tensor), name
    _, report = nybble.quantize(source, made[0.25], ids, out=tmp_path / "out", settings=SETTINGS)
    loaded = nybble.load(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(loaded[name], off[name]) for name in off) and report.layers


def test_trained_from_a_folder_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes; what was trained is not trained again."""
    from nybble.checkpoint.parts import Parts
    from nybble.pipelines import prepared

    torch.set_num_threads(1)
    source, ids, made = str(save_tiny(tmp_path / "model", **ONE)), tokens(0, 8), recipe(TRAIN, **FEW)
    nybble.quantize(source, made, ids, out=tmp_path / "whole", settings=SETTINGS)
    write, trained = Parts.write, prepared._trained
    calls: list[int] = []

    class Stop(BaseException):
        pass

    def stopping(*args: Any, **kwargs: Any) -> None:
        raise Stop

    def counting(*args: Any) -> dict[str, Tensor]:
        calls.append(1)
        return trained(*args)

    monkeypatch.setattr(prepared, "_trained", counting)
    monkeypatch.setattr(Parts, "write", stopping)
    with pytest.raises(Stop):
        nybble.quantize(source, made, ids, out=tmp_path / "out", settings=SETTINGS)
    monkeypatch.setattr(Parts, "write", write)
    nybble.quantize(source, made, ids, out=tmp_path / "out", settings=replace(SETTINGS, resume=True))
    assert len(calls) == 1
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "times.json"} for n in ("whole", "out")
    ]
    assert files[0] == files[1]
    loaded, _ = nybble.load(tmp_path / "out")
    assert not any("lora" in name or name.endswith((".a", ".b")) for name in loaded.state_dict())


# ------------------------------------------------------------------------------------------------ on held-out loss
def chain(seed: int, samples: int) -> Tensor:
    """Tokens of a Markov chain: of each token four may follow, one of them most often."""
    draw = torch.Generator().manual_seed(77)
    following = torch.randint(3, 60, (60, 4), generator=draw)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (samples, 24), generator=draw)
    picks = torch.multinomial(torch.tensor([0.7, 0.1, 0.1, 0.1]), samples * 24, True, generator=draw).view(samples, 24)
    for at in range(1, 24):
        ids[:, at] = following[ids[:, at - 1], picks[:, at]]
    return ids


@cache
def trained() -> Any:
    """A llama of two blocks that has learned the chain."""
    torch.set_num_threads(1)
    model = tiny_model(dtype=torch.float32, hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.div_(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        ids = chain(1000 + step, 24)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def loss(model: Any) -> float:
    ids = chain(5, 64)
    return float(model(ids, labels=ids).loss)


@pytest.mark.parametrize("rate", [4e-3, 1e-2])  # gains beside the first pass, not after the second; the other way round
def test_what_is_judged_is_a_second_pass_over_the_merged_weights(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept where the network that comes of it loses less on the samples held back, by transformers' own loss."""
    settings = nybble.Settings(samples=16, seq_len=24, batch=8, dtype=torch.float32)
    train = {"train": "restorative-lora", "steps": 15 if rate < 1e-2 else 30, "rank": 8, "rate": rate, "batch": 8}
    ids, real, seen = chain(3, 16), RestorativeLora.judge, list[float | None]()

    def run(held: float) -> tuple[dict[str, Tensor], float]:
        steps = [{**train, "held": held}, {"solver": "rtn"}] if held else [{"solver": "rtn"}]
        made = parse_recipe({"name": "made", "scheme": {"weights": "int2 channel"}, "steps": steps})
        model: Any = nybble.quantize(copy.deepcopy(trained()), made, ids, settings=settings)[0]
        with torch.no_grad():
            return model.state_dict(), float(model(ids[rows], labels=ids[rows]).loss)

    def taking(step: RestorativeLora, trainee: Any) -> float:
        seen.append(real(step, trainee))
        return -len(seen)

    rows = RestorativeLora(held=0.25)._parts(SimpleNamespace(samples=16, seed=0))[1]  # type: ignore[arg-type]
    (off, alone), (judged, _) = run(0), run(0.25)
    monkeypatch.setattr(RestorativeLora, "judge", taking)
    on, prepared = run(0.25)
    assert seen == pytest.approx([alone, prepared], rel=1e-5)
    assert any(not torch.equal(on[name], off[name]) for name in off)
    better = on if prepared < alone else off
    assert all(torch.equal(judged[name], better[name]) for name in off)


def test_better_than_others_of_its_bits() -> None:
    """Binary by rounding; and what outlier columns in 16 bits reach by rounding with no fewer bits."""
    settings = nybble.Settings(samples=48, seq_len=24, batch=8, dtype=torch.float32)

    def run(made: Any) -> tuple[float, float]:
        model, report = nybble.quantize(copy.deepcopy(trained()), made, chain(3, 48), settings=settings)
        return loss(model), report.bits

    plain = parse_recipe({"name": "rtn", "scheme": {"weights": BINARY}, "steps": [{"solver": "rtn"}]})
    columns = [{"solver": "outlier-columns", "share": 0.1}]
    outliers = parse_recipe({"name": "columns", "scheme": {"weights": BINARY}, "steps": columns})
    learn: dict[str, Any] = {"steps": 30, "rates": {"scales": 5e-3, "factors": 2e-2}}
    found, bits = run(recipe(**learn))
    prepared, same = run(recipe({"steps": 60, "rank": 8, "rate": 1e-3, "batch": 8}, **learn))
    rounded, binary_bits = run(plain)
    kept, kept_bits = run(outliers)
    assert binary_bits < bits == same < kept_bits
    assert loss(trained()) < found < min(rounded, kept)
    assert prepared < found


# ------------------------------------------------------------------------------------------------ other networks
class Net(nn.Module):
    """A convolution with BatchNorm, a grouped one, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 16, 3, groups=2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))
        return y


def encoder() -> tuple[nn.Module, Any]:
    make: Any = transformers.BertConfig
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertModel(make(vocab_size=300, **sizes)), {"input_ids": tokens(0, 8)}


def vit() -> tuple[nn.Module, Any]:
    make: Any = transformers.ViTConfig
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.ViTForImageClassification(make(image_size=16, patch_size=8, num_labels=5, **sizes))
    return model, {"pixel_values": pixels()}


def pixels() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("make", [encoder, vit, lambda: (Net(), {"x": pixels()})], ids=["encoder", "vit", "cnn"])
def test_whole_on_other_networks(make: Any) -> None:
    """Trained to give what the float network gives, quantized, better than one bit for all."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, given = make()
    model = model.eval()
    wanted = main_output(model(**given)).detach()
    made = recipe({**TRAIN, "steps": 4}, steps=4)
    binary = parse_recipe({"name": "rtn", "scheme": made.scheme.to_dict(), "steps": [{"solver": "rtn"}]})
    errors, settings = [], nybble.Settings(batch=4, dtype=torch.float32)
    for each in (made, binary):
        found, report = nybble.quantize(copy.deepcopy(model), each, given, settings=settings)
        with torch.no_grad():
            errors.append(float((main_output(found(**given)) - wanted).square().mean()))
        assert report.layers and all(row.bits is not None for row in report.layers)
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"steps": -1}, "steps=-1"),
        ({"rate": 0.0}, "rate=0"),
        ({"dropout": 1.0}, "dropout=1"),
        ({"loss": "next"}, "loss"),
        ({"ranks": 2}, "no option 'ranks'"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        make_train_step("restorative-lora", options)


def test_training_that_cannot_be() -> None:
    model, ids = tiny_model(dtype=torch.float32), tokens(0, 4)
    with pytest.raises(SchemeError, match=r"skip=re:\.\* leaves no quantized layer"):
        nybble.quantize(model, recipe({**TRAIN, "skip": ["re:.*"]}, **FEW), ids, settings=SETTINGS)
    before = {name: p.clone() for name, p in tiny_model(dtype=torch.float32).state_dict().items()}
    with pytest.raises(LearningError, match="the loss of restorative-lora is"):
        nybble.quantize(model, recipe({**TRAIN, "rate": 1e30}, **FEW), ids, settings=SETTINGS)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
