"""Outer scales: what moves and what stays, gradients by hand, and that the loss falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import logits, tiny_model
from torch import Tensor

import nybble
from nybble.core.errors import SchemeError
from nybble.learned import make_part
from nybble.learned.outer_scales import Outer
from nybble.nn.packed import Packed
from nybble.qtensor import Inverse
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe

DQ = "nf4 flat=16 scale_format=(dynamic8 flat=32 scale_format=float32 center=mean)"
# MX over a scale of each row
ROW = "float4_e2m1fn group=16 scale=pow2 scale_format=(float8_e8m0fnu channel scale=absmax(target=1))"
MINIMA = "int4 group=16 scale=minmax(offset=true) scale_format=(uint8 channel) offset_format=(int8 channel)"
LINES = ("nvfp4", "nvfp4-ct", "nvfp4-46", "fp4-m2 group=16", "nf4-bnb-dq", DQ, ROW, MINIMA)
INNER, CODES = ("fixed", "learned"), ("rounded", "fixed")


def weight(seed: int = 0) -> Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) + 0.1


def learned(line: str, x: Tensor, start: Any = None, **options: Any) -> Outer:
    found = make_part("outer-scales", options).make(Quantizer(line), x, start)
    assert isinstance(found, Outer)
    return found.train()


def packed(part: Outer, x: Tensor) -> BlockQTensor:
    found = part.eval().settle(x)
    assert isinstance(found, BlockQTensor)
    return found


def trained(part: Outer, x: Tensor, target: Tensor, steps: int = 30, rate: float = 0.02) -> Outer:
    optimizer = torch.optim.Adam(part.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (part.train()(x) - target).square().mean().backward()
        optimizer.step()
    return part


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("codes", CODES)
def test_moves_what_is_above_and_keeps_what_it_should(line: str, inner: str, codes: str) -> None:
    """Begins at round-to-nearest; then the outer scale is another, and eval is what training computes with."""
    x, quantizer = weight(), Quantizer(line)
    nearest, part = quantizer.quantize(x), learned(line, x, codes=codes, inner=inner)
    assert torch.equal(packed(part, x).dequantize(), nearest.dequantize())
    assert torch.equal(part.train()(x), nearest.dequantize())
    found = packed(trained(part, x, 1.3 * x), x)
    assert torch.equal(part.train()(x), found.dequantize())
    assert found.spec() == nearest.spec() and not torch.equal(found.dequantize(), nearest.dequantize())
    scales = [tensor.params.scale for tensor in (found, nearest)]
    assert all(isinstance(scale, BlockQTensor) for scale in scales)
    outers = [scale.params.scale for scale in scales if isinstance(scale, BlockQTensor)]
    bare = [outer.divisor if isinstance(outer, Inverse) else outer for outer in outers]
    assert not torch.equal(bare[0], bare[1])  # type: ignore[arg-type]
    same = [torch.equal(scales[0].codes, scales[1].codes)]  # type: ignore[union-attr]
    if inner == "fixed":
        assert same == [True]
        assert part.held.state_dict().keys() == learned(line, x).held.state_dict().keys()
    if codes == "fixed":
        assert torch.equal(found.codes, nearest.codes)
    loss = [float((tensor.dequantize() - 1.3 * x).square().mean()) for tensor in (found, nearest)]
    if codes == "fixed":  # what is rounded anew stays near what it was
        assert loss[0] < 0.8 * loss[1]


def test_gradients_by_hand() -> None:
    """With codes that stay dw_hat/dt = w_hat: one number for NVFP4's tensor; dw_hat/du = S v for the mean of scales."""
    x, upstream = weight(), weight(1)
    part = learned("nvfp4", x, codes="fixed")
    (part(x) * upstream).sum().backward()
    (found,) = part.groups()["outer"]
    wanted = (packed(part, x).dequantize().double() * upstream).sum()
    assert found.shape == (1, 1) or found.numel() == 1
    torch.testing.assert_close(found.grad.double().sum(), wanted, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]

    part = learned(DQ, x, codes="fixed")
    (part(x) * upstream).sum().backward()
    stored = packed(part, x)
    scale = stored.params.scale
    assert isinstance(scale, BlockQTensor)
    mean, size = scale.params.offset, scale.params.scale
    assert isinstance(mean, Tensor) and isinstance(size, Tensor)
    values = stored.dequantize().double().view(32, 16) / scale.dequantize().double().view(32, 1)
    out = (values * upstream.double().view(32, 16)).sum(1)
    bare = scale.dequantize().double().flatten() - mean.double().flatten()
    grown, moved = part.get_parameter("scale_grown"), part.get_parameter("scale_moved")
    assert grown.grad is not None and moved.grad is not None
    torch.testing.assert_close(grown.grad.double().sum(), (bare * out).sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.grad.double().sum(), (size.double().flatten() * out).sum(), rtol=1e-4, atol=1e-5)


def test_a_solvers_codes_stay_where_they_are_fixed() -> None:
    generator = torch.Generator().manual_seed(3)
    x, quantizer = weight(), Quantizer("nvfp4")
    nearest = quantizer.quantize(x)
    codes = quantizer.quantize(x + 0.3 * torch.randn(8, 64, generator=generator), nearest.params).unpacked()
    solved = quantizer.pack(codes, quantizer.soften(nearest.params))
    part = trained(learned("nvfp4", solved.dequantize(), solved, codes="fixed"), x, x.roll(1, 0))
    assert torch.equal(packed(part, x).unpacked(), solved.unpacked())
    assert make_part("outer-scales", {"codes": "fixed"}).keeps_codes and not make_part("outer-scales", {}).keeps_codes


def test_frozen_codes_holds_what_this_learns() -> None:
    """The scale above is what ``frozen-codes`` and ``block-ap`` leave as it is."""
    x = weight()
    for name in ("frozen-codes", "block-ap"):
        part = make_part(name, {}).make(Quantizer("nvfp4"), x)
        optimizer = torch.optim.Adam(part.parameters(), lr=0.02)
        for _ in range(5):
            optimizer.zero_grad()
            (part.train()(x) - 1.3 * x).square().mean().backward()
            optimizer.step()
        found, nearest = part.eval().settle(x), Quantizer("nvfp4").quantize(x)
        assert isinstance(found, BlockQTensor)
        outer = [t.params.scale.params.scale for t in (found, nearest)]  # type: ignore[union-attr]
        assert torch.equal(outer[0], outer[1]) and not torch.equal(found.dequantize(), nearest.dequantize())


@pytest.mark.parametrize("before", ["rtn", "gptq"])
def test_behind_a_solver(tmp_path: Path, before: str) -> None:
    """The window's own loss falls, and the file gives the same model; behind GPTQ its codes stay."""

    def run(*more: dict[str, Any]) -> tuple[Any, Any]:
        scheme = {"targets": ["re:.*_proj"], "weights": "nvfp4"}
        recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": [{"solver": before}, *more]})
        tokens = torch.randint(3, 300, (16, 16), generator=torch.Generator().manual_seed(0))
        settings = nybble.Settings(samples=16, seq_len=16, batch=4, dtype=torch.float32)
        return nybble.quantize(tiny_model(dtype=torch.float32), recipe, tokens, settings=settings)

    part = {"outer-scales": {"codes": "fixed"}} if before == "gptq" else "outer-scales"
    step = {"reconstruction": "mse", "weights": part, "steps": 20, "rates": {"outer": 2e-3}, "keep": "best", "every": 5}
    (plain, _), (model, report) = run(), run(step)
    entries = [row.learned["windows"][0] for row in report.layers if row.learned]
    assert len(entries) == 14 and all(entry["after"] < entry["before"] for entry in entries)
    loaded, _ = nybble.load(nybble.save(model, tmp_path / "saved"))
    assert torch.equal(logits(loaded), logits(model))
    if before == "gptq":
        for name, module in model.model.layers[0].named_modules():
            if isinstance(getattr(module, "weight", None), Packed):
                other = plain.model.layers[0].get_submodule(name).weight.qtensor()
                assert torch.equal(module.weight.qtensor().codes, other.codes)


def test_refusals() -> None:
    for line in ("int4 group=16", "mxfp4", "float4_e2m1fn group=16 scale_format=float16"):
        with pytest.raises(SchemeError, match=r"outer-scales learns the scale that other scales have.*nvfp4.*binariz"):
            make_part("outer-scales", {}).make(Quantizer(line), weight())
    with pytest.raises(SchemeError, match="inner"):
        make_part("outer-scales", {"inner": "moved"})
