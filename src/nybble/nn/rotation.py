"""A layer's input in another basis while the model runs: blocks of neighbouring channels, each times one matrix.

    x'  =  x V,      V = diag(B, B, ..., B),      B = diag(signs) H / sqrt(n)     or any orthogonal B

With ``W' = W V`` the layer computes the same, ``x' W'^T = x W^T``, and an outlier of x is spread over its block.
Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 4 (stages 1c, 1d); Liu et al. 2024 (SpinQuant),
arXiv:2405.16406, R4. Computed in float32; H is a Hadamard matrix (:mod:`nybble.core.orthogonal`).
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.core.orthogonal import hadamard_factors
from nybble.nn.operands import check_floats

_CLOSE = 1e-3
"""How far the rows of a matrix from a file may be from orthonormal: those that were stored in bfloat16 are so far."""


@torch.library.custom_op(
    "nybble::rotate",
    mutates_args=(),
    schema="(Tensor x, Tensor? signs, Tensor? matrix, int block, bool back) -> Tensor",
)
def rotate(x: Tensor, signs: Tensor | None, matrix: Tensor | None, block: int, back: bool) -> Tensor:
    """``x V``, or ``x V^T``, which brings it back.

    Args:
        x: float [..., channels].
        signs: int8 [block] of +-1, or None.
        matrix: float32 [block, block] in the Hadamard matrix's place, or None.
        block: channels that are rotated among themselves; divides their number.
        back: by the transposed matrix.

    Returns:
        shape and dtype of x; sums are in float32.

    Raises:
        UsageError: the block doesn't divide the channels, or the signs, the matrix are not of its size.
    """
    check_floats("rotate", x)
    fits = (signs is None or signs.shape == (block,)) and (matrix is None or matrix.shape == (block, block))
    if block < 1 or x.shape[-1] % block or not fits:
        raise UsageError(f"rotate: x {list(x.shape)} in blocks of {block} channels, which don't fit.")
    wide = x if x.dtype == torch.float64 else x.float()
    rows = wide.reshape(-1, block)
    if signs is not None and not back:
        rows = rows * signs
    rows = _hadamard(rows, back) if matrix is None else rows @ (matrix.T if back else matrix).to(rows.dtype)
    if signs is not None and back:
        rows = rows * signs
    made = rows.reshape(x.shape).to(x.dtype)
    return made.clone() if made.data_ptr() == x.data_ptr() else made


@rotate.register_fake
def _(x: Tensor, signs: Tensor | None, matrix: Tensor | None, block: int, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.given = inputs[1:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    signs, matrix, block, back = ctx.given
    return rotate(gradient, signs, matrix, block, not back), None, None, None, None


rotate.register_autograd(_backward, setup_context=_keep)


def _hadamard(rows: Tensor, back: bool) -> Tensor:
    """[rows, n] times a Hadamard matrix over sqrt(n), factor by factor, the last one first."""
    n, found = rows.shape[1], rows
    for factor in reversed(_factors(n, rows.dtype, rows.device)):
        found = (found.reshape(-1, n // len(factor), len(factor)) @ (factor.T if back else factor)).mT
    return found.reshape(-1, n) * (1 / math.sqrt(n))


@lru_cache(maxsize=64)
def _factors(order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(torch.from_numpy(each).to(device, dtype) for each in hadamard_factors(order))


class BlockRotation(nn.Module):
    """The rotation as a module; it learns nothing, and is orthogonal.

    Args:
        block: channels that are rotated among themselves.
        signs: int8 [block] of +-1, which channels are multiplied with first; None: no signs.
        matrix: float32 [block, block] in place of a Hadamard matrix; None: that.

    Raises:
        SchemeError: no Hadamard matrix of this order is known.
    """

    signs: Tensor | None
    matrix: Tensor | None

    def __init__(self, block: int, signs: Tensor | None = None, matrix: Tensor | None = None) -> None:
        super().__init__()
        if matrix is None:
            hadamard_factors(block)
        self.block = block
        self.register_buffer("signs", signs)
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """``x V``; ``back``: ``x V^T``. [..., channels], the dtype stays."""
        found: Tensor = rotate(x, self.signs, self.matrix, self.block, back)
        return found

    def basis(self) -> Tensor:
        """B, float32 [block, block]."""
        some = self.signs if self.signs is not None else self.matrix
        found: Tensor = self(torch.eye(self.block, device=None if some is None else some.device))
        return found

    def at(self, device: torch.device) -> BlockRotation:
        """This, moved to a device; on the meta device it waits for a file's numbers, and stays."""
        if any(buffer.device != device and not buffer.is_meta for buffer in self.buffers()):
            self.to(device)
        return self

    @property
    def in_words(self) -> str:
        """What ``inspect`` calls it: ``hadamard=128``."""
        kind = "hadamard" if self.matrix is None else "matrix"
        return f"{'random ' if self.signs is not None else ''}{kind}={self.block}"

    def to_dict(self) -> dict[str, Any]:
        """For config.json: the block, and which tensors it has."""
        return {"block": self.block, **{name: True for name, _ in self.named_buffers()}}

    @staticmethod
    def from_dict(data: Any) -> BlockRotation:
        """Inverse of :meth:`to_dict`, tensors to be filled from a checkpoint.

        Raises:
            FileError: it is none.
        """
        block = data.get("block") if isinstance(data, dict) else None
        if type(block) is not int or not 0 < block <= 1 << 20 or not set(data) <= {"block", "signs", "matrix"}:
            raise FileError(f"a rotation is described as {data!r:.80}; it has a block, and may have signs or a matrix.")
        signs = torch.ones(block, dtype=torch.int8) if data.get("signs") else None
        matrix = torch.empty(block, block, dtype=torch.float32) if data.get("matrix") else None
        try:
            return BlockRotation(block, signs, matrix)
        except SchemeError as error:
            raise FileError(f"a rotation of a checkpoint: {error}") from error

    def validate(self) -> None:
        """Raise FileError for signs that are none, or a matrix that is not orthogonal."""
        if self.signs is not None and not bool((self.signs.abs() == 1).all()):
            raise FileError("the signs of a rotation are other numbers than 1 and -1.")
        if self.matrix is not None:
            error = self.matrix @ self.matrix.T - torch.eye(self.block, device=self.matrix.device)
            if not float(error.abs().max()) < _CLOSE:  # NaN is none
                raise FileError("the matrix of a rotation is not orthogonal.")

    def _apply(self, fn: Any, recurse: bool = True) -> BlockRotation:
        # Signs and matrix keep their dtypes: only moves between devices pass.
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:  # noqa: D102
        return self.in_words


_MARK = "_nybble_rotation"
"""In a float layer's ``__dict__``, inside a tuple: no part of its state, and copied with it."""


def mark_rotated(layer: nn.Module, rotation: BlockRotation | None) -> None:
    """Say that a float layer will be quantized behind a rotation of its input (None: no longer); it stays the same."""
    vars(layer).pop(_MARK, None)
    if rotation is not None:
        vars(layer)[_MARK] = (rotation,)


def rotation_of(layer: nn.Module) -> BlockRotation | None:
    """What :func:`mark_rotated` said of a layer."""
    found: tuple[BlockRotation] | None = vars(layer).get(_MARK)
    return None if found is None else found[0]


def mark_alike(model: nn.Module, like: nn.Module) -> None:
    """Mark the layers of a float model as those of another copy of it are."""
    for name, module in like.named_modules():
        found = rotation_of(module)
        if found is not None:
            mark_rotated(model.get_submodule(name), copy.deepcopy(found))
