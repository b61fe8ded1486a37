"""HQQ: its own library's numbers, and what the same steps do to scales (Badri & Shaji 2023)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.qtensor import dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.solvers import Solved, Stats, Weight
from nybble.solvers.hqq import Hqq

# fmt: off
MATRIX = [
    0, -659, 342, -17, -989, 978, 67, -749, 706, -144, 725, -113, 239, 775, -2200, -339, -104, -736, 427, -706,
    -267, -1448, -295, 234, 488, 379, 445, -434, 1007, 343, 323, -111,
]  # of 4 x 8, in 1024ths

# What hqq 0.2.8.post1 (torch 2.13.0, CPU) found for MATRIX / 1024 * size:
#     Quantizer.quantize(w, nbits=bits, group_size=8, axis=1, bitpack=False, device="cpu")
# codes, the same for both sizes, and by (size, bits) meta["zero"]; meta["scale"] of size 1; and the zeros of
#     optimize_weights_proximal_slow (100 iterations, kappa 1.01, no early stop), started as the library starts.
CODES = {
    2: [2, 1, 2, 2, 0, 3, 2, 1, 3, 2, 3, 2, 2, 3, 0, 2, 2, 1, 3, 1, 2, 0, 2, 3, 2, 2, 2, 0, 3, 2, 2, 1],
    4: [8, 3, 10, 7, 0, 15, 8, 2, 15, 10, 15, 11, 12, 15, 0, 9, 11, 6, 15, 6, 9, 0, 9, 13, 10, 8, 9, 0, 15, 8, 8, 3],
}
ZEROS = {
    (0.1, 2): [1.820793, 2.169244, 2.329, 1.115024], (1.0, 2): [1.655542, 2.208949, 2.325543, 1.115024],
    (0.1, 4): [7.603965, 11.096219, 11.52, 4.450122], (1.0, 4): [7.603965, 11.096219, 11.52, 4.450122],
}
SLOW = {
    (0.1, 2): [1.820793, 2.169244, 2.329, 1.115024], (1.0, 2): [1.945216, 2.217052, 2.302282, 1.126498],
    (0.1, 4): [7.603965, 11.096219, 11.52, 4.450122], (1.0, 4): [7.603965, 11.084666, 11.52, 4.450122],
}
SCALES = {
    2: [0.6402995, 0.9684245, 0.61035156, 0.46907553], 4: [0.12805991, 0.19368489, 0.12207031, 0.09381511],
}
# fmt: on


def matrix(size: float) -> Tensor:
    return (torch.tensor(MATRIX).view(4, 8) / 1024 * size).float()


def solve(solver: Hqq, w: Tensor, line: str) -> Solved:
    return solver.solve([Weight(name="w", matrix=w, quantizer=Quantizer(line))], Stats())[0]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("size", [0.1, 1.0])
def test_it_is_what_its_library_finds(size: float, bits: int) -> None:
    """At size 1 with 2 bits errors are large enough to be shrunk; at 0.1 the offset is the mean of what is left."""
    quantizer = Quantizer(f"int{bits}_full group=8 scale=minmax(offset=true) scale_format=float32")
    quantizer = quantizer.replace(offset_format="float32")
    slow = Hqq(iterations=100, kappa=1.01, early_stop=False)
    for solver, zeros in ((Hqq(), ZEROS), (slow, SLOW)):
        params = solver.params(matrix(size), quantizer)
        assert isinstance(params.scale, Tensor) and isinstance(params.offset, Tensor)
        scale, lowest = params.scale.flatten(), quantizer.format.min
        torch.testing.assert_close(scale, torch.tensor(SCALES[bits]) * size, rtol=2e-6, atol=0)
        # x_hat = S (code - zero) there, S (code + lowest) + offset here
        zero = -(params.offset.flatten() + scale * lowest) / scale
        torch.testing.assert_close(zero, torch.tensor(zeros[size, bits]), rtol=2e-6, atol=2e-6)
        found = quantizer.quantize(matrix(size), params).dequantize()
        codes = torch.tensor(CODES[bits]).view(4, 8)
        wanted = (codes - torch.tensor(zeros[size, bits])[:, None]) * torch.tensor(SCALES[bits])[:, None] * size
        torch.testing.assert_close(found, wanted, rtol=0, atol=4e-6 * size)


def test_an_integer_zero_point_becomes_an_offset() -> None:
    found = solve(Hqq(), matrix(0.1), "int4 group=8 symmetric=false")
    assert str(found.quantizer) == "int4_full group=8 scale=minmax(offset=true)"
    assert isinstance(found.weight, BlockQTensor) and found.weight.params.zero_point is None
    assert isinstance(found.weight.params.offset, Tensor) and found.weight.params.offset.dtype == torch.float16
    assert found.weight.nbytes() == Hqq().stored_bytes(Quantizer("int4 group=8 symmetric=false"), (4, 8))
    assert found.error < 0.9 * found.rtn_error


@pytest.mark.parametrize("line", ["int3 group=16", "nvfp4", "mxfp4", "nf4 flat=48", "float4_e2m1fn block=2x16"])
def test_scales_move_where_a_block_gains(line: str) -> None:
    """No block loses, as stored; many gain, but for powers of two, which are too far apart to be moved."""
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    quantizer = Quantizer(line)
    found, plain = solve(Hqq(), w, line).weight.dequantize(), quantizer.quantize(w).dequantize()
    before, after = (quantizer.granularity.to_blocks((w - x).square()).sum(1) for x in (plain, found))
    assert bool((after <= before).all())
    assert float((after < before).double().mean()) > (0.2 if line != "mxfp4" else -1)


def test_two_values_get_the_mean_magnitude() -> None:
    """Of errors too small to be split off, the best scale for +-1 is known: the mean of the magnitudes."""
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * 0.02
    found = solve(Hqq(), w, "binary group=16 scale_format=float32").weight
    assert isinstance(found, BlockQTensor) and not isinstance(found.params.scale, type(None))
    torch.testing.assert_close(dense(found.params.scale), w.abs().mean(1, keepdim=True))  # type: ignore[arg-type]


def test_powers_of_two_stay_powers_of_two() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    found = solve(Hqq(), w, "binary group=16 scale=pow2(mode=floor)")
    assert isinstance(found.weight, BlockQTensor) and isinstance(found.weight.params.scale, Tensor)
    logarithm = found.weight.params.scale.float().log2()
    assert torch.equal(logarithm, logarithm.round()) and found.error < found.rtn_error


def test_what_is_worse_falls_back_and_bad_input() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(128))
    w[:, ::37] *= 4
    found = solve(Hqq(), w, "int2 group=64 symmetric=false")
    assert found.error == found.rtn_error and "kept the latter" in found.notes[0] and found.quantizer is None
    for line in ("int4 rank1", "float16_e8m7 tensor scale=one"):
        with pytest.raises(SchemeError, match="hqq moves the offset or the scale of a block"):
            Hqq().quantizer_for(Quantizer(line))
    with pytest.raises(SchemeError, match="0 < lp_norm <= 1"):
        Hqq(lp_norm=1.5)
    with pytest.raises(SchemeError, match="kappa at least 1"):
        Hqq(kappa=0.9)
    with pytest.raises(SchemeError, match="at least one"):
        Hqq(iterations=0)
