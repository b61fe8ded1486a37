"""Products of packed weights on a CPU, by the compiled library; what it can't read goes the readable way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nybble.kernels._library import library, team
from nybble.kernels._places import kept_with
from nybble.kernels._weights import DTYPES, Weight, weight_of
from nybble.nn.products import check_ids, packed_linear, packed_rows, qtensor_of, reference, rows_reference
from nybble.qtensor import QTensor
from nybble.qtensor._by_rows import row_pieces
from nybble.qtensor.block import BlockQTensor

ROWS = 16
"""Of x, up to which codes are looked up for each sixteen; for more W is expanded, a part at a time."""
MORE = 64
"""The same with AVX-512, whose products outrun what expanding W takes: of float32, and of bfloat16 with a large W."""
LARGE = 1 << 21
"""Elements of such a W."""
SMALL = 1 << 15
"""Elements of W below which calling the library takes longer than it saves."""
PART = 1 << 22
"""Elements of W that are expanded at a time."""
_ISA = 4
_SETS = {0: "any processor", 2: "AVX2", 3: "AVX-512", 4: "AVX-512, of bfloat16 by its own"}
_PLAN = "_nybble_weight"


def linear(x: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    """See :func:`nybble.nn.products.reference`."""
    n, k = shape
    if n * k < SMALL or not x.numel() or x.dtype not in DTYPES:
        return reference(x, tensors, key, shape, bias)
    weight, rows = _weight(tensors, key), x.numel() // k
    if weight is None:
        found = _by_pieces(x, qtensor_of(tensors, key), bias) if rows <= ROWS else None
        return reference(x, tensors, key, shape, bias) if found is None else found
    if rows > ROWS and rows > _most(weight, x.dtype):
        return _expanded(x, weight, bias)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], n))
    wide = None if bias is None else bias.float().contiguous()
    _run(weight, x, rows, wide, out, 0, n)
    return out


def rows(ids: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See :func:`nybble.nn.products.rows_reference`."""
    weight, found = _weight(tensors, key), library()
    if weight is None or found is None or not ids.numel() or dtype not in DTYPES or ids.dtype != torch.int64:
        return rows_reference(ids, tensors, key, shape, dtype)
    check_ids(ids, weight.n)
    ids = ids.contiguous()
    out = torch.empty((*ids.shape, weight.k), dtype=dtype)
    if found.nybble_rows(weight.address, ids.data_ptr(), ids.numel(), out.data_ptr(), DTYPES[dtype], _ISA):
        raise MemoryError(f"no memory for rows of a packed table [{weight.n}, {weight.k}].")
    return out


def how(tensors: Sequence[Tensor], key: str, shape: Sequence[int]) -> tuple[bool, str]:
    """See ``packed_linear.how``."""
    made = library()
    if made is None:
        return False, "no compiled library"
    if shape[0] * shape[1] < SMALL:
        return False, f"fewer than {SMALL:,} elements"
    weight = _weight(tensors, key)
    if weight is None:
        return False, str(weight_of(qtensor_of(tensors, key), made.nybble_prepare))
    return True, f"compiled look-up, {_SETS[made.nybble_set(weight.address, _ISA)]}"


def how_rows(tensors: Sequence[Tensor], key: str, shape: Sequence[int]) -> tuple[bool, str]:
    """See ``packed_rows.how``: rows are looked up, however few elements a table has."""
    made = library()
    if made is None:
        return False, "no compiled library"
    if _weight(tensors, key) is None:
        return False, str(weight_of(qtensor_of(tensors, key), made.nybble_prepare))
    return True, "compiled look-up of rows"


def _by_pieces(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor | None:
    """Without the library: some rows of W at a time, looked up by torch, never all; None where W can't be cut."""
    pieces = row_pieces(weight) if isinstance(weight, BlockQTensor) else None
    if pieces is None:
        return None
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    wide = x.float()
    for rows, values in pieces:
        y = functional.linear(wide, values)
        out[..., rows] = y if bias is None else y.add_(bias[rows])
    return out


def _most(weight: Weight, dtype: torch.dtype) -> int:
    """Rows of x up to which looking codes up is faster."""
    found = library()
    assert found is not None
    ways = {torch.float32: 3, torch.bfloat16: 4 if weight.n * weight.k >= LARGE else _ISA + 1}
    return MORE if found.nybble_set(weight.address, _ISA) >= ways.get(dtype, _ISA + 1) else ROWS


def _expanded(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """W in the dtype of x, whole or a part at a time: the reference's bits where it is whole."""
    step = max(1, PART // weight.k)
    if step >= weight.n:
        return functional.linear(x, _values(weight, x, 0, weight.n), bias)
    out = x.new_empty((*x.shape[:-1], weight.n))
    for start in range(0, weight.n, step):
        stop = min(start + step, weight.n)
        part = None if bias is None else bias[start:stop]
        out[..., start:stop] = functional.linear(x, _values(weight, x, start, stop), part)
    return out


def _values(weight: Weight, like: Tensor, start: int, stop: int) -> Tensor:
    out = like.new_empty((stop - start, weight.k))
    _run(weight, None, 0, None, out, start, stop)
    return out


def _run(weight: Weight, x: Tensor | None, rows: int, bias: Tensor | None, out: Tensor, start: int, stop: int) -> None:
    found = library()
    assert found is not None
    place = out.data_ptr() - (0 if x is not None else start * weight.k * out.element_size())
    failed = found.nybble_run(
        weight.address,
        None if x is None else x.data_ptr(),
        0 if x is None else DTYPES[x.dtype],
        rows,
        None if bias is None else bias.data_ptr(),
        place,
        DTYPES[out.dtype],
        start,
        stop,
        torch.get_num_threads(),
        _ISA,
        team(),
    )
    if failed:
        raise MemoryError(f"no memory for a product with a packed weight [{weight.n}, {weight.k}].")


def _weight(tensors: Sequence[Tensor], key: str) -> Weight | None:
    """The library's record of a weight, made once; None where it can't read it."""
    return kept_with(tensors, key, _PLAN, lambda: _made(tensors, key))


def _made(tensors: Sequence[Tensor], key: str) -> Weight | None:
    made = library()
    weight = None if made is None else weight_of(qtensor_of(tensors, key), made.nybble_prepare)
    return weight if isinstance(weight, Weight) else None


packed_linear.register_kernel("cpu", how)(linear)
packed_rows.register_kernel("cpu", how_rows)(rows)
