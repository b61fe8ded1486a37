"""Code books and thresholds as tensors: they decide as a registered format does, learn, and travel with the codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.contracts.inputs import near_decisions, random_bits, same
from torch import Tensor

from nybble.core.errors import DataError, FileError, FormatError, SchemeError
from nybble.core.tensorfile import write_tensorfile
from nybble.formats import format_names, get_format
from nybble.ops.grid import Grid, nearest
from nybble.ops.tables import decision_points, neighbours
from nybble.qtensor import QuantParams, from_spec
from nybble.quantizer import Quantizer
from nybble.rounding import REGISTRY as ROUNDINGS
from nybble.rounding import get_rounding

OWN = [name for name in format_names() if get_format(name).bits <= 8 and np.isfinite(get_format(name).values).all()]
TIES = [name for name in ROUNDINGS.names() if get_rounding(name).tie_up is not None]


def own_values(name: str) -> Tensor:
    """The format's values by code; what its encoder never produces doubles a value that it does."""
    fmt = get_format(name)
    values = fmt.values.copy()
    values[~fmt.encodable()] = fmt.max
    return torch.from_numpy(values).float()


def learned() -> Tensor:
    """Sixteen values in no order, two of them equal."""
    values = torch.randn(16, generator=torch.Generator().manual_seed(3))
    values[11] = values[4]
    return values


@pytest.mark.parametrize("name", OWN)
def test_a_formats_own_values_decide_as_the_format(name: str) -> None:
    """Every tie rule, all decision points with both neighbours, all exponents, -0, infinities."""
    fmt = get_format(name)
    x = torch.cat([near_decisions(fmt), random_bits(4000)])
    for rounding in TIES:
        if name == "binary" and rounding != "half-up":  # sign(0) = +1 under any rule, which its values don't say
            continue
        by_name, by_values = Grid(fmt, rounding), Grid(fmt, rounding, table=own_values(name))
        assert same(by_values.nearest(x), by_name.nearest(x)), rounding
        finite = x[~x.isnan()]
        codes = by_values.encode(finite)
        assert codes.dtype == torch.uint8 and same(codes, by_name.encode(finite)), rounding
        assert same(by_values.decode(codes), by_values.nearest(finite))
    for mine, theirs in zip(neighbours(x, own_values(name)), neighbours(x, fmt), strict=True):
        assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))


@pytest.mark.parametrize("line", ["nf4 flat=48", "float4_e2m1fn group=32", "int4 shifted=2", "nf4-dq", "nvfp4"])
def test_fake_is_packed_is_reloaded(line: str, tmp_path: Path) -> None:
    q = Quantizer(line)
    x = torch.randn(12, 96)
    for params in (
        replace(q.measured(x, None), grid=learned()),
        replace(q.measured(x, None), thresholds=torch.randn(15).sort().values, grid=learned()),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            fake = q.fake_quantize(x.to(dtype), params)
            packed = q.quantize(x.to(dtype), params)
            assert same(packed.dequantize(dtype), fake)
            assert same(q.soft(x.to(dtype), q.soften(params)), fake)
            assert len(set(fake.flatten().tolist())) > 16
        path = tmp_path / "t.safetensors"
        write_tensorfile(path, packed.tensors(), {"spec": json.dumps(packed.spec())})
        again = from_spec(json.loads(json.dumps(packed.spec())), load_file(path))
        assert same(again.dequantize(dtype), fake) and again.spec() == packed.spec()
        assert packed.roles()["grid"] == "tables" and packed.bytes_by_role()["tables"] >= 64
        assert same(packed.to("cpu").dequantize(dtype), fake)
        assert same(q.pack(packed.unpacked(), params).dequantize(dtype), fake)


def test_nearest_by_brute_force() -> None:
    values, x = learned(), torch.cat([torch.randn(5000), learned(), torch.tensor([1e30, -1e30, torch.inf, -torch.inf])])
    grid = Grid(get_format("nf4"), table=values)
    best = (x[:, None].double() - values.double()).abs().amin(1)
    finite = x.isfinite()
    assert torch.equal((x.double() - grid.nearest(x).double()).abs()[finite], best[finite])
    assert grid.nearest(torch.tensor([torch.inf, -torch.inf])).tolist() == [values.max(), values.min()]
    assert 11 not in grid.encode(x).tolist() and 4 in grid.encode(x).tolist()  # of equal values the lower code
    lower, upper = grid.neighbours(x)
    assert (upper >= lower).all() and torch.isin(lower, values).all() and torch.isin(upper, values).all()
    between = (values[None] > lower[:, None]) & (values[None] < upper[:, None])
    assert not between.any()


def test_values_get_the_gradient_of_their_elements() -> None:
    """d x_hat / d value = scale, summed over the elements that hold the code; x and scale as of any format."""
    q = Quantizer("nf4 channel")
    x = (torch.randn(6, 64) * 2).requires_grad_()
    values, scale = learned().requires_grad_(), (torch.rand(6, 1) + 0.5).requires_grad_()
    params = QuantParams(scale, grid=values)
    weight = torch.randn(6, 64)
    out = q.soft(x, params)
    assert same(out.detach(), q.fake_quantize(x, q.harden(params)))
    to_values, to_scale, to_x = torch.autograd.grad((out * weight).sum(), [values, scale, x])
    codes = q.quantize(x, q.harden(params)).unpacked().long()
    want = torch.zeros(16).index_add(0, codes.flatten(), (weight * scale).detach().flatten())
    assert torch.allclose(to_values, want, atol=1e-5)
    y = (x / scale).detach()
    inside = (y >= values.min()) & (y <= values.max())
    assert 0 < inside.sum() < inside.numel() and torch.allclose(to_x, weight * inside)
    assert torch.allclose(to_scale[:, 0], (weight * (values[codes] - y * inside)).sum(1).detach(), atol=1e-4)


def test_a_trained_code_book_is_stored_as_it_ended() -> None:
    """Lloyd's code book by gradient steps: a lower error than the format that it began with, and the same bits."""
    q = Quantizer("nf4 channel")
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).exp()
    raw = replace(q.soften(q.fit(x)), grid=own_values("nf4"))
    grid = raw.grid
    assert grid is not None
    before = (q.fake_quantize(x, raw) - x).square().mean()
    grid.requires_grad_()
    optimizer = torch.optim.Adam([grid], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (q.soft(x, raw) - x).square().mean()
        grid.grad = torch.autograd.grad(loss, grid)[0]
        optimizer.step()
    stored = q.quantize(x, q.harden(raw))
    assert (stored.dequantize() - x).square().mean() < 0.5 * before
    assert not stored.params.grid.requires_grad  # type: ignore[union-attr]
    assert same(stored.dequantize(), q.soft(x, raw).detach())
    assert same(q.settle(x, raw, nearest).dequantize(), stored.dequantize())


def test_thresholds_count() -> None:
    """N2UQ: the code is how many thresholds are <= x, whatever the values."""
    q = Quantizer("uint2 tensor")
    thresholds = torch.tensor([0.3, 0.8, 1.9])
    x = torch.tensor([[-1.0, 0.29, 0.3, 0.79, 0.8, 1.0, 1.9, 50.0, -0.0]])
    codes = [[0, 0, 1, 1, 2, 2, 3, 3, 0]]
    plain = q.quantize(x, QuantParams(torch.ones(1, 1), thresholds=thresholds))
    assert plain.unpacked().tolist() == codes and plain.dequantize().tolist() == codes
    grid = torch.tensor([-5.0, 0.0, 1.0, 10.0])
    other = q.quantize(x, QuantParams(torch.full((1, 1), 1.0), thresholds=thresholds, grid=grid))
    assert other.unpacked().tolist() == codes and torch.equal(other.dequantize(), grid[plain.unpacked().long()])


def test_stochastic_on_a_learned_grid() -> None:
    q = Quantizer("nf4 tensor rounding=stochastic")
    x = torch.full((1, 40_000), 0.31)
    params = QuantParams(torch.ones(1, 1), grid=learned())
    out = q.fake_quantize(x, params, torch.Generator().manual_seed(0))
    lower, upper = neighbours(x[0, :1], learned())
    assert set(out.flatten().tolist()) == {float(lower), float(upper)}
    assert abs(float(out.mean()) - 0.31) < 5 * float(upper - lower) / 2 / 200
    assert same(q.quantize(x, params, torch.Generator().manual_seed(0)).dequantize(), out)


def test_refused() -> None:
    fmt = get_format("int4_full")
    with pytest.raises(DataError, match="16 values"):
        Grid(fmt, table=torch.zeros(15))
    with pytest.raises(SchemeError, match="zero point"):
        Grid(fmt, table=torch.zeros(16), zero=torch.zeros(1, 1))
    with pytest.raises(SchemeError, match="floor"):
        Grid(fmt, floor="normal", table=torch.zeros(16))
    with pytest.raises(FormatError, match="native"):
        decision_points(learned(), "native")
    q = Quantizer("nf4 channel")
    packed = q.quantize(torch.randn(4, 8), QuantParams(torch.ones(4, 1), grid=learned()))
    for wrong in (learned()[:8], learned().double()):
        spec = packed.spec()
        spec["grid"] = {"kind": "plain", "dtype": str(wrong.dtype)[6:], "shape": list(wrong.shape)}
        with pytest.raises(FileError, match="16 values of float32"):
            from_spec(spec, packed.tensors() | {"grid": wrong})
