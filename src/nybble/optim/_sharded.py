"""Parameters that are DTensors (FSDP2's ``fully_shard``, tensor parallelism): each process keeps its shard's states.

Blocks follow the shard: its first element begins a block, whatever it is in the whole tensor. Where every shard begins
where a block of the whole would (all of FSDP2's do where the rows of a process hold a whole number of blocks), the
codes are those of one process, and a saved state is a DTensor of rows of blocks, which torch.distributed.checkpoint can
cut anew for another number of processes. Elsewhere a state is saved shard by shard under names that tell its place, and
only the same shards can read it again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.formats import get_format
from nybble.granularity import make_granularity
from nybble.granularity.channel import PerChannel
from nybble.granularity.flat import Flat
from nybble.granularity.group import PerGroup
from nybble.quantizer import Quantizer

SHARDS = "shards"


def is_dtensor(t: object) -> bool:
    """Whether this is a DTensor; nothing is imported."""
    known: Any = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(t, known.DTensor)


def local(t: Tensor) -> Tensor:
    """A DTensor's shard of this process, in the same memory; other tensors as they are; without gradients."""
    found: Any = t.detach()
    here: Tensor = found.to_local() if is_dtensor(found) else found
    return here


def local_gradient(p: Tensor) -> Tensor:
    """The part of the gradient that belongs to :func:`local` of its parameter."""
    assert p.grad is not None
    grad: Any = p.grad
    if is_dtensor(p) and is_dtensor(grad):
        ours: Any = p
        if grad.placements != ours.placements:
            grad = grad.redistribute(placements=ours.placements)
    return local(grad)


def is_cut(p: Tensor) -> bool:
    """Whether no process has all of the parameter."""
    if not is_dtensor(p):
        return False
    known: Any = p
    return any(not way.is_replicate() and known.device_mesh.size(i) > 1 for i, way in enumerate(known.placements))


def span(p: Tensor) -> str:
    """Which part of the parameter is here: ``[0:350, 0:64] of [700, 64]``; empty for all of it."""
    if not is_cut(p):
        return ""
    shape, offset = _located(p)
    spans = ", ".join(f"{start}:{start + size}" for start, size in zip(offset, shape, strict=True))
    return f"[{spans}] of {list(p.shape)}"


# ------------------------------------------------------------------------------------------------- in a state dict
def spread(saved: Any, p: Tensor) -> Any:
    """A local state, in the form of a state dict, as its part of the whole one.

    Args:
        saved: float, or a dict of codes and what they mean.
        p: the parameter.

    Returns:
        DTensors in place of tensors; or a dict of the shard by its :func:`span`, where blocks and shards end apart.
    """
    if not is_dtensor(p):
        return saved
    if isinstance(saved, Tensor):
        return _whole(saved, p, tuple(p.shape)) if saved.dim() else saved
    known: Any = p
    shards = any(not way.is_replicate() for way in known.placements)  # also of one process: all save alike
    unit = _unit(saved, p) if shards else None
    if unit is not None:
        units = _ceil(p.shape[0], unit[0]), _ceil(local(p).shape[0], unit[0])
        sizes = {name: size for name, size in zip(("codes", "scale"), unit[1:], strict=True) if name in saved}
        found = {k: _whole(_padded(saved[k], units[1], size), p, (units[0], size)) for k, size in sizes.items()}
        return {**saved, "spec": _spec(saved["spec"], tuple(p.shape)), **found}
    if is_cut(p):
        return {"quantizer": saved["quantizer"], SHARDS: {span(p): {k: saved[k] for k in saved if k != "quantizer"}}}
    return {key: _whole(x, p, tuple(x.shape)) if isinstance(x, Tensor) else x for key, x in saved.items()}


def gathered(saved: Any, p: Tensor) -> Any:
    """The inverse of :func:`spread`: the local state of ``p``, also of a whole one that one process saved.

    Raises:
        SchemeError: saved by other shards, where other blocks end.
    """
    if isinstance(saved, Tensor):
        return _own(saved, p) if saved.dim() else saved
    if not isinstance(saved, Mapping) or not (is_dtensor(p) or _is_spread(saved)):
        return saved
    if SHARDS in saved:
        known = saved[SHARDS]
        if span(p) not in known:
            _refuse(" and ".join(known), p)
        return {"quantizer": saved["quantizer"], **known[span(p)]}
    unit = _unit(saved, p)
    if unit is None:
        if is_cut(p):
            _refuse("", p)
        return {key: local(x) if isinstance(x, Tensor) else x for key, x in saved.items()}
    spec, first = _spec(saved["spec"], tuple(local(p).shape)), _first_row(p) // unit[0]
    found = {"codes": _cut(saved["codes"], first * unit[1], _bytes(spec))}
    if "scale" in saved:
        shape = spec["scale"]["shape"]
        found["scale"] = _cut(saved["scale"], first * unit[2], math.prod(shape)).reshape(shape)
    return {**saved, "spec": spec, **found}


def _refuse(where: str, p: Tensor) -> None:
    """Raise SchemeError: blocks end elsewhere."""
    raise SchemeError(
        f"it was saved {'in the shards ' + where if where else 'whole'}, and is kept here as "
        f"{span(p) or 'one'}, whose blocks end elsewhere. Load it with as many processes as have saved it, or save and "
        "load it where the rows of each process are a whole number of blocks."
    )


def _is_spread(saved: Mapping[str, Any]) -> bool:
    """Whether this may be of :func:`spread`: by shards, DTensors, or gathered ones, in rows of blocks."""
    codes = saved.get("codes")
    return SHARDS in saved or (isinstance(codes, Tensor) and (is_dtensor(codes) or codes.dim() == 2))


def _unit(saved: Mapping[str, Any], p: Tensor) -> tuple[int, int, int] | None:
    """Rows that hold whole blocks and whole bytes, bytes of their codes, and their scales; None where shards end apart.

    Known are blocks of neighbours, of plain scales.
    """
    if not isinstance(saved.get("quantizer"), str) or not p.dim() or not {*saved.get("spec", "?")} <= _PLAIN:
        return None
    q, columns = Quantizer(saved["quantizer"]), math.prod(p.shape[1:])
    match q.granularity:
        case Flat(size=size):
            block = size
        case PerGroup(size=size, pad=False):
            block = size
        case PerChannel():
            block = columns
        case _:
            return None
    scale: Mapping[str, Any] = saved["spec"].get("scale", {"kind": "plain"})
    if not block or not columns or scale.get("kind") != "plain":
        return None
    whole = math.lcm(block, 8 // math.gcd(q.format.bits, 8))
    rows = whole // math.gcd(whole, columns)
    elements = rows * columns
    return (rows, elements * q.format.bits // 8, elements // block) if _ends_with(rows, p) else None


_PLAIN = {"kind", "format", "granularity", "shape", "scale"}


def _ends_with(rows: int, p: Tensor) -> bool:
    """Whether every shard ends where such a number of rows does."""
    if not is_cut(p):
        return True
    from torch.distributed.tensor import Shard

    known: Any = p
    ways = [(way, known.device_mesh.size(i)) for i, way in enumerate(known.placements)]
    cuts = [(way, size) for way, size in ways if not way.is_replicate() and size > 1]
    if len(cuts) > 1 or type(cuts[0][0]) is not Shard or cuts[0][0].dim != 0:
        return False
    return bool(_ceil(p.shape[0], cuts[0][1]) % rows == 0)


def _spec(spec: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The description of the same codes, of a tensor of another shape."""
    found = {**spec, "shape": list(shape)}
    if "scale" in spec:
        found["scale"] = {**spec["scale"], "shape": list(make_granularity(str(spec["granularity"])).scale_shape(shape))}
    return found


def _bytes(spec: Mapping[str, Any]) -> int:
    return _ceil(math.prod(spec["shape"]) * get_format(spec["format"]).bits, 8)


def _whole(x: Tensor, p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What this process has of a tensor that lies as ``p`` does."""
    from torch.distributed.tensor import DTensor

    known: Any = p
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    made: Tensor = DTensor.from_local(
        x.contiguous(), known.device_mesh, known.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made


def _padded(x: Tensor, rows: int, size: int) -> Tensor:
    """[rows, size] of a flat tensor, zeros behind a last row that is short."""
    return torch.nn.functional.pad(x.reshape(-1), (0, rows * size - x.numel())).view(rows, size)


def _cut(x: Tensor, first: int, count: int) -> Tensor:
    """The local part of a DTensor, or ``count`` elements of a whole tensor from ``first`` on; flat."""
    found = local(x).reshape(-1)
    return found[:count] if is_dtensor(x) else found[first : first + count]


def _own(x: Tensor, p: Tensor) -> Tensor:
    """The local part of a tensor of the parameter's shape."""
    if is_dtensor(x) or not is_cut(p) or x.shape != p.shape:
        return local(x)
    shape, offset = _located(p)
    return x[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def _first_row(p: Tensor) -> int:
    return int(_located(p)[1][0]) if is_cut(p) else 0


def _located(p: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of the local part."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as located

    known: Any = p
    shape, offset = located(p.shape, known.device_mesh, known.placements)
    return tuple(shape), tuple(offset)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
