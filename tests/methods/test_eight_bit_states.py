"""8-bit optimizers (Dettmers et al. 2022): what the sheet says that a faithful implementation must show.

Numbers are the sheet's list. Its checks 6 and 8 are in tests/parts/optim (test_adamw.py, test_room.py), 7 in
tests/contracts/test_optimizers.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.formats import get_format
from nybble.optim.adamw import AdamW
from nybble.optim.lion import Lion
from nybble.quantizer import Quantizer

SIGNED, UNSIGNED = Quantizer("state8"), Quantizer("state8-unsigned")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_maps() -> None:
    """1: 256 different values, the places of 0, no -1, the largest gaps."""
    signed, unsigned = (get_format(name).values.astype(np.float32) for name in ("dynamic8", "udynamic8"))
    for table, gap in ((signed, 0.0140625), (unsigned, 0.00703125)):
        assert len(np.unique(table)) == 256 and (np.diff(table) > 0).all()
        assert np.diff(table).max() == pytest.approx(gap, rel=1e-4)
    assert signed[127] == 0 and (signed < 0).sum() == 127 and signed[-1] == 1
    assert signed[0] == pytest.approx(-0.99296875, rel=1e-6) and unsigned[0] == 0 and unsigned[-1] == 1


def test_idempotence() -> None:
    """2: whole where a block's extreme is positive, every value of the map among it; not where it is negative."""
    table = torch.from_numpy(get_format("dynamic8").values.astype(np.float32))
    for scale in (1.0, 3.7, 2.0**-20):
        kept = SIGNED.quantize(table * scale)
        assert torch.equal(kept.codes.long(), torch.arange(256)) and torch.equal(kept.dequantize(), table * scale)
    x = draw(64, 256)
    x[:, 0] = 9.0
    kept = SIGNED.quantize(x)
    assert torch.equal(SIGNED.quantize(kept.dequantize()).codes, kept.codes)
    x[:, 0] = -9.0
    once = SIGNED.quantize(x)
    again = SIGNED.quantize(once.dequantize())
    before, after = once.params.scale, again.params.scale
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    assert torch.equal(once.dequantize()[:, 1:] != again.dequantize()[:, 1:], once.dequantize()[:, 1:] != 0)
    assert torch.allclose(after / before, torch.tensor(0.99296875))


def test_error_bounds() -> None:
    """3: half the largest gap of a block's extreme; reached where the extreme is negative."""
    x = draw(512, 256)
    for q, values, bound in ((SIGNED, x, 0.00703125), (UNSIGNED, x.square(), 0.003515625)):
        error = (q.quantize(values).dequantize() - values).abs() / values.abs().amax(1, keepdim=True)
        assert 0.9 * bound < error.max() <= bound + 2.0**-23
    x[:, 3] = -10.0
    reached = (SIGNED.quantize(x).dequantize() - x)[:, 3]
    assert torch.allclose(reached, torch.tensor(0.0703125), rtol=1e-4)


def test_locality() -> None:
    """4: a block changes no other's codes; four outliers cost blocks of 2,048 a fifth of what one block loses."""
    x = draw(16, 256)
    louder = x.clone()
    louder[5] *= 1e4
    assert torch.equal(SIGNED.quantize(louder).codes, SIGNED.quantize(x).codes)
    loud = x.clone()
    loud[5, 7] *= 1e4
    same = SIGNED.quantize(loud).codes.view(16, 256) == SIGNED.quantize(x).codes.view(16, 256)
    assert same[torch.arange(16) != 5].all() and not same[5].all()

    y = draw(1 << 20, seed=1)
    y[:: 1 << 18] = 1000.0
    blocks, whole = (
        (Quantizer(f"dynamic8 {cut}").quantize(y).dequantize() - y).abs().mean() for cut in ("flat=2048", "tensor")
    )
    assert 5 * blocks < whole


def test_magnitudes_of_several_decades() -> None:
    """5: log-normal (sigma 2) times normal: a median relative error of 0.06, where int8 has 1.0."""
    x = draw(1 << 18) * torch.exp(2 * draw(1 << 18, seed=1))
    dynamic, linear = (
        ((Quantizer(f"{fmt} flat=2048").quantize(x).dequantize() - x) / x).abs().median()
        for fmt in ("dynamic8", "int8")
    )
    assert 0.04 < dynamic < 0.08 and linear > 0.9
    gaussian = draw(1 << 18, seed=2)  # and no such thing for plain Gaussians, as the sheet warns
    errors = [
        (Quantizer(f"{fmt} flat=2048").quantize(gaussian).dequantize() - gaussian).abs().mean()
        for fmt in ("dynamic8", "int8")
    ]
    assert errors[0] > errors[1]


@pytest.mark.parametrize("line", ["state8", "state4", "int8 flat=64", "float8_e4m3fn flat=256", "state8-companded"])
def test_signs_are_kept(line: str) -> None:
    """What rounds to 0 takes the smallest value of its sign; 0 stays 0, all other codes stay, v is as without it."""
    gradient = draw(64, 64) * torch.exp(4 * draw(64, 64, seed=1))
    gradient[3] = 0
    kept = {}
    for keep in (False, True):
        p = nn.Parameter(torch.ones(64, 64))
        optimizer = AdamW([p], state=line, keep_sign=keep, min_size=0)
        p.grad = gradient.clone()
        optimizer.step()
        kept[keep] = optimizer.state[p]
    without, m = (kept[keep]["exp_avg"].dequantize() for keep in (False, True))
    lost = (without == 0) & (gradient != 0)
    assert lost.sum() > 20 and (m[3] == 0).all()
    assert torch.equal(m.sign(), gradient.sign()) and torch.equal(m[~lost], without[~lost])
    block = (
        kept[True]["exp_avg"].params.scale.repeat_interleave(4096 // kept[True]["exp_avg"].params.scale.numel()).float()
    )
    fmt = kept[True]["exp_avg"].format
    assert torch.allclose(m.flatten().abs()[lost.flatten()], float(fmt.smallest) * block[lost.flatten()])
    assert torch.equal(kept[True]["exp_avg_sq"].codes, kept[False]["exp_avg_sq"].codes)


def test_signs_that_cannot_be_kept() -> None:
    for line in ("int8 flat=64 symmetric=false", "uint8 flat=64 symmetric=false"):
        with pytest.raises(SchemeError, match=r"keep_sign: exp_avg is kept in .* no zero of its own"):
            Lion([nn.Parameter(torch.ones(64, 64))], state=line, keep_sign=True)


def test_fp8_is_torchs_cast() -> None:
    """``AdamWFp8``: a block's largest at 448, then torch's own float8_e4m3fn, as torchao keeps them."""
    x = draw(64, 256) * torch.exp(2 * draw(64, 256, seed=1))
    kept = Quantizer("state-fp8").quantize(x)
    scale = x.abs().amax(1, keepdim=True) / 448
    assert isinstance(kept.params.scale, Tensor)
    assert torch.equal(kept.params.scale, scale.flatten())
    assert torch.equal(kept.dequantize(), (x / scale).to(torch.float8_e4m3fn).float() * scale)
