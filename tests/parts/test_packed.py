"""Packed: every kind of QTensor as a module: filled from a file, moved, copied; a forward checks no value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.contracts.test_qtensors import MADE
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nybble.core.errors import FileError
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed, validate_packed
from nybble.qtensor import REGISTRY, QTensor, from_spec
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.qtensor.split import SplitQTensor
from nybble.qtensor.vector import VectorQTensor

WAITS = (
    "item",
    "tolist",
    "__int__",
    "__bool__",
    "__float__",
    "__index__",
    "numpy",
    "cpu",
    "equal",
    "nonzero",
    "unique",
)


class NoWaiting(TorchFunctionMode):
    """Fails where a value is read, for which a GPU would be waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in WAITS, f"{func} reads values"
        return func(*args, **(kwargs or {}))


def on_meta(tensor: QTensor) -> QTensor:
    return from_spec(tensor.spec(), {name: t.to("meta") for name, t in tensor.tensors().items()})


def other(tensor: QTensor) -> dict[str, Tensor]:
    """State for the same layout with other values."""
    return {name: t.roll(2 if t.dim() == 1 and len(t) > 2 else 1) for name, t in tensor.tensors().items()}


@pytest.mark.parametrize("name", MADE)
def test_filled_from_a_checkpoint(name: str) -> None:
    tensor = MADE[name]()
    packed = Packed(on_meta(tensor))
    assert packed.qtensor().dequantize().device.type == "meta"
    packed.load_state_dict(tensor.tensors(), assign=True)
    validate_packed(packed)
    assert torch.equal(packed.dequantize(torch.float32), tensor.dequantize())
    packed.load_state_dict(other(tensor), assign=True)
    want = from_spec(tensor.spec(), other(tensor)).dequantize()
    assert torch.equal(packed.dequantize(torch.float32), want)


@pytest.mark.parametrize("name", MADE)
def test_a_forward_checks_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Packed(MADE[name]())
    expected = packed.dequantize(torch.bfloat16)
    calls: list[str] = []
    for kind in REGISTRY.all().values():
        monkeypatch.setattr(kind, "rebuild", lambda *_: calls.append("rebuild"))
        monkeypatch.setattr(kind, "validate", lambda *_: calls.append("validate"))
    with NoWaiting():
        for _ in range(3):
            assert packed.dequantize(torch.bfloat16).shape == expected.shape
    assert not calls


@pytest.mark.parametrize("name", MADE)
def test_the_record_is_made_without_reading_values(name: str) -> None:
    tensor = MADE[name]()
    with NoWaiting():
        from_spec(tensor.spec(), tensor.tensors())
    with pytest.raises(AssertionError, match="reads values"), NoWaiting():
        torch.ones(1).tolist()


def test_follows_its_buffers() -> None:
    tensor = MADE["block nested"]()
    packed = Packed(tensor)
    first = packed.dequantize(torch.float32)
    assert packed.qtensor() is packed.qtensor()

    layer = QuantLinear(tensor)
    x, codes = torch.eye(64), layer.weight.get_buffer("codes")  # type: ignore[union-attr]
    assert torch.equal(layer(x).T, first)
    lent = torch.func.functional_call(layer, {"weight.codes": torch.zeros_like(codes)}, (x,))
    assert not torch.equal(lent.T, first)
    assert torch.equal(layer(x).T, first)

    twin = copy.deepcopy(packed)
    assert twin._view is None  # the record is not copied with it
    with torch.no_grad():
        twin.get_buffer("codes").zero_()
    assert torch.equal(packed.dequantize(torch.float32), first)
    assert not torch.equal(twin.dequantize(torch.float32), first)

    packed.get_buffer("codes").zero_()  # in place: the same tensor
    assert torch.equal(packed.dequantize(torch.float32), twin.dequantize(torch.float32))

    packed.to("meta")
    assert packed._view is None  # a released block keeps no tensor alive
    packed.load_state_dict(tensor.tensors(), assign=True)
    assert packed.qtensor().tensors()["codes"] is packed.get_buffer("codes")


def test_held_values_are_dropped_with_their_buffers() -> None:
    tensor = MADE["split"]()
    packed = Packed(tensor)
    packed.hold(torch.float32)
    packed.load_state_dict(other(tensor), assign=True)
    assert torch.equal(packed.dequantize(torch.float32), from_spec(tensor.spec(), other(tensor)).dequantize())


def test_a_buffer_of_another_dtype() -> None:
    packed = Packed(MADE["split"]())
    packed._buffers["index"] = packed.get_buffer("index").long()
    with pytest.raises(FileError, match=r"index of 64 slices is torch\.int32 \[64\]; found torch\.int64"):
        packed.dequantize(torch.float32)


def test_values_are_checked_once_asked() -> None:
    vector, split, low_rank = (MADE[name]() for name in ("vector", "split", "low-rank-sum"))
    assert isinstance(vector, VectorQTensor) and isinstance(split, SplitQTensor) and isinstance(low_rank, LowRankSum)
    for tensor in (vector, split, low_rank):
        tensor.validate()
    vector.indices[5] = 200  # of 200 entries
    split.index[3] = split.index[4]
    inside = MADE["split"]()
    assert isinstance(inside, SplitQTensor)
    inside.index[0] = -1
    split_inside = SplitQTensor(split.shape, 1, torch.arange(64).int(), (inside,))
    nested = LowRankSum(low_rank.base, torch.ones(12, 1), vector_row(bad=True))
    for tensor, message in (
        (vector, "entry 200 of a code book of 200"),
        (split, "no permutation of its 64 slices"),
        (split_inside, "part.0: the index of a split tensor"),
        (nested, "b: an index points to entry 9 of a code book of 3"),
    ):
        from_spec(tensor.spec(), tensor.tensors())  # the structure is right
        with pytest.raises(FileError, match=message):
            tensor.validate()
        holder = torch.nn.ModuleDict({"layer": Packed(tensor)})
        with pytest.raises(FileError, match=rf"layer: .*{message.split(':')[-1].strip()}"):
            validate_packed(holder)


def vector_row(bad: bool) -> VectorQTensor:
    made = VectorQTensor.make((1, 64), torch.rand(16, 4), torch.full((16,), 9))
    return VectorQTensor(made.shape, made.codebook[:3], made.indices, made.bits) if bad else made
