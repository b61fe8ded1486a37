"""Rotations of inputs: against another library's Hadamard matrices, and as a record that a file describes."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.core.orthogonal import hadamard_factors, hadamard_signs
from nybble.nn.rotation import BlockRotation, rotate


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 64, 76, 128, 256, 384, 576, 768, 1536])
def test_factors_make_hadamard_matrices(order: int) -> None:
    factors = hadamard_factors(order)
    found = reduce(np.kron, factors).astype(np.float32)
    assert np.array_equal(found @ found.T, order * np.eye(order, dtype=np.float32))
    assert max(map(len, factors)) <= 128
    if order & (order - 1) == 0:
        assert np.array_equal(found, deterministic_hadamard_matrix(order, torch.float32).numpy())


def test_factors_are_there_wherever_a_matrix_is() -> None:
    for order in range(200):
        if hadamard_signs(order) is None:
            with pytest.raises(SchemeError, match=f"order {order} is known"):
                hadamard_factors(order)
        else:
            assert np.prod([len(each) for each in hadamard_factors(order)]) == order


@pytest.mark.parametrize("block", [2, 16, 256])
@pytest.mark.parametrize("signed", [False, True])
def test_blocks_are_multiplied_by_the_matrix(block: int, signed: bool) -> None:
    x = torch.randn(3, 5, 512, dtype=torch.float64)
    signs = torch.randint(0, 2, (block,)).mul(2).sub(1).to(torch.int8) if signed else None
    basis = deterministic_hadamard_matrix(block, torch.float64) / block**0.5
    basis = basis if signs is None else signs.double().diag() @ basis
    wanted = x @ torch.kron(torch.eye(512 // block, dtype=torch.float64), basis)
    torch.testing.assert_close(rotate(x, signs, None, block, False), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate(wanted, signs, None, block, True), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate(x, None, basis, block, False), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(BlockRotation(block, signs).basis().double(), basis, rtol=0, atol=1e-6)


def test_sums_are_in_float32_and_the_dtype_stays() -> None:
    x = torch.randn(4, 96).bfloat16()
    found = rotate(x, None, None, 48, False)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(x.float(), None, None, 48, False).bfloat16())


@pytest.mark.parametrize("back", [False, True])
def test_gradients(back: bool) -> None:
    signs = torch.tensor([1, -1, -1, 1, 1, 1, -1, 1, 1, 1, 1, -1], dtype=torch.int8)
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, signs, None, 12, back), (x,))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"x \[2, 30\] in blocks of 4"):
        rotate(torch.randn(2, 30), None, None, 4, False)
    with pytest.raises(UsageError, match="blocks of 4"):
        rotate(torch.randn(2, 32), torch.ones(8, dtype=torch.int8), None, 4, False)
    with pytest.raises(UsageError, match="int64"):
        rotate(torch.ones(2, 32, dtype=torch.int64), None, None, 4, False)


@pytest.mark.parametrize(
    "data", [None, {}, {"block": "4"}, {"block": 0}, {"block": True}, {"block": 1 << 40}, {"block": 4, "more": 1}]
)
def test_malformed_descriptions(data: Any) -> None:
    with pytest.raises(FileError, match="rotation"):
        BlockRotation.from_dict(data)


def test_numbers_of_a_file_are_looked_at() -> None:
    BlockRotation(4, torch.tensor([1, -1, 1, 1], dtype=torch.int8)).validate()
    with pytest.raises(FileError, match="other numbers than 1 and -1"):
        BlockRotation(4, torch.tensor([1, 0, 1, 1], dtype=torch.int8)).validate()
    BlockRotation(4, matrix=torch.eye(4)).validate()
    for wrong in (2 * torch.eye(4), torch.full((4, 4), float("nan"))):
        with pytest.raises(FileError, match="not orthogonal"):
            BlockRotation(4, matrix=wrong).validate()


def test_only_its_place_changes() -> None:
    made = BlockRotation(4, torch.ones(4, dtype=torch.int8), torch.eye(4)).to(torch.bfloat16)
    assert made.signs is not None and made.signs.dtype == torch.int8
    assert made.matrix is not None and made.matrix.dtype == torch.float32
