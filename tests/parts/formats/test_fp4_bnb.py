"""Golden values: number-formats sheet, section 8; QLoRA sheet, the FP4 alternative."""

from __future__ import annotations

import numpy as np

from nybble.formats import get_format


def test_table() -> None:
    magnitudes = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float32)
    fmt = get_format("fp4_bnb")
    assert np.array_equal(fmt.values.astype(np.float32), np.concatenate([magnitudes, -magnitudes]))
    assert len(fmt.grid) == 15 and fmt.max == 1 and fmt.negative_zero == 8
    assert get_format("bnb_fp4") is fmt


def test_constants() -> None:
    constants = np.array([1 / 384, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32)
    own = get_format("fp4_bnb").thresholds("native")
    upper = np.nextafter(own[7:], np.float32(-9))
    assert np.abs(upper - constants).max() < 1e-7
    assert np.array_equal(own[:7], -upper[::-1]), "odd: a tie keeps the smaller magnitude on both sides"


def test_against_ocp() -> None:
    """Versus E2M1 / 6: the smallest value is 16 times smaller and the codes are permuted."""
    ours, ocp = get_format("fp4_bnb"), get_format("e2m1")
    assert np.allclose(ours.grid[ours.grid > 0.1], ocp.grid[ocp.grid > 0.5] / 6, atol=1e-7)
    assert abs(ocp.smallest / 6 / ours.smallest - 16) < 1e-6
    assert ours.values[1:8].argsort().tolist() != ocp.values[1:8].argsort().tolist()
