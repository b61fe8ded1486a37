"""A folder of nybble's in compressed-tensors' form: its tensors by nybble's names, in nybble's layouts.

config.json and the weight files are compressed-tensors', and load without nybble. nybble.json keeps nybble's own
description of the model beside them, and by it every weight, every quantizer of activations and the KV cache come back
as they were: the same values, to the last bit. What both files say has to agree. compressed-tensors isn't needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, NybbleError
from nybble.kv_format import one_scale
from nybble.models.sources.layouts import FLOATS, Files, PackedWeight, packed_weights
from nybble.models.sources.layouts._ct_args import CannotError, above, activation_args, kv_args, weight_args
from nybble.models.sources.layouts.compressed_tensors import group_of
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import Stored, kind_of_entry
from nybble.nn.kv_model import KVRecord
from nybble.packing import get_layout
from nybble.qtensor import Inverse, QTensor, QuantParams, ScaleLike, from_spec
from nybble.qtensor.block import BlockQTensor

Read = Callable[[str], Tensor]
_SIDES = {"inputs": "input", "outputs": "output"}
_OPTIONAL = ("group_size", "block_structure", "scale_dtype")


@dataclass
class Compressed:
    """Where nybble's tensors are in compressed-tensors' files.

    Attributes:
        roles: name in the files -> codes, scales, offsets or tables. owners: the quantized weight that it is of.
    """

    roles: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    _weights: dict[str, tuple[PackedWeight, BlockQTensor]] = field(default_factory=dict)
    _prefixes: dict[str, str] = field(default_factory=dict)
    _sides: dict[str, tuple[str, int]] = field(default_factory=dict)
    _last: tuple[str, dict[str, Tensor]] = ("", {})

    def __contains__(self, name: object) -> bool:
        """Whether nybble's tensor ``name`` is made of others, not one of the files."""
        return name in self._prefixes or name in self._sides

    def tensor(self, name: str, read: Read) -> Tensor:
        """One of nybble's tensors that the files don't have as it is.

        Args:
            name: its own.
            read: gives a tensor of the files.

        Raises:
            FileError: a number in the files that can't be meant.
        """
        if name in self._sides:
            stored, half = self._sides[name]
            return read(stored).float().reshape(1) + half
        prefix = self._prefixes[name]
        if self._last[0] != prefix:  # a weight's tensors are asked for one after the other: it is read once
            packed, empty = self._weights[prefix]
            (found,) = packed.made(read)
            self._last = prefix, _as_described(prefix, found, empty)
        return self._last[1][name.removeprefix(f"{prefix}.")]

    def add(self, name: str, entry: dict[str, Any], weights: list[QTensor], packed: dict[str, PackedWeight]) -> None:
        """Take in the module ``name``, as nybble describes it; its packed weight leaves ``packed``."""
        said = Stored()
        kind_of_entry(name, entry).stored(name, entry, weights, said)
        for prefix in said.elements:
            empty = weights[entry["weight"]]
            if prefix not in packed or not isinstance(empty, BlockQTensor):
                raise FileError(f"nybble.json describes {prefix}, which the weight files hold in no packed form.")
            found = packed.pop(prefix)
            if found.rotation is not None:
                raise FileError(f"config.json rotates the input of {name}, and nybble.json says nothing of it.")
            if tuple(found.shape) != tuple(empty.shape):
                raise FileError(f"{prefix} is {list(found.shape)}; nybble.json says {list(empty.shape)}.")
            self._weights[prefix] = found, empty
            self._prefixes |= {f"{prefix}.{part}": prefix for part in empty.tensors()}
            for role, stored in found.parts.items():
                self.roles[stored], self.owners[stored] = found.kept_as[role], prefix
        for side, word in _SIDES.items():
            if side not in entry:
                continue
            quantizer = ActivationQuantizer.from_dict(entry[side])
            for part in quantizer.state_dict():
                half = above(quantizer.quantizer.format) if part == "zero_point" else 0
                stored = f"{name}.{word}_{'global_scale' if part == 'divisor' else part}"
                self._sides[f"{name}.{side}.{part}"] = stored, half
                self.roles[stored] = quantizer.roles()[part]


def compressed(
    stated: Mapping[str, Any],
    modules: Mapping[str, Any],
    weights: list[QTensor],
    kv: KVRecord | None,
    files: Files,
) -> Compressed:
    """Compare what the two files say of a folder, and find nybble's tensors in it.

    Args:
        stated: ``quantization_config`` of config.json.
        modules: nybble's descriptions by name.
        weights: the layouts that they number, on the meta device.
        kv: what nybble caches in.
        files: what is there.

    Raises:
        FileError: they contradict each other, or tensors are missing or damaged.
    """
    packed, _ = packed_weights(stated, files)
    found = Compressed()
    for name, entry in modules.items():
        found.add(name, entry, weights, packed)
        _check_scheme(name, entry, weights, stated)
    if packed:
        raise FileError(f"the weight files hold {next(iter(packed))} packed, which nybble.json doesn't describe.")
    for stored, role in found.roles.items():
        if stored not in found.owners:
            files.need(stored, ("F32",) if role == "scales" else ("I8",), (1,))
    said = stated.get("kv_cache_scheme")
    width = said.get("group_size") if isinstance(said, dict) else None
    args = None if kv is None else _args(kv_args, kv, width or 0)
    _agree("the KV cache", "", args, said)
    if args is not None and not args["dynamic"]:
        found.roles |= _cache_scales(files, kv)
    return found


def _cache_scales(files: Files, kv: KVRecord | None) -> dict[str, str]:
    """The scales of a KV cache that has one a layer: they have to be what nybble.json says, 1 of one without."""
    names = [name for name in files.entries if name.endswith((".k_scale", ".v_scale"))]
    for name in names:
        holder, _, leaf = name.rpartition(".")
        own = kv.get(holder) if isinstance(kv, Mapping) else kv
        said = None if own is None else one_scale(own.keys if leaf == "k_scale" else own.values)
        files.any_of(name, FLOATS, ((), (1,), (1, 1)))
        value = files.small(name).float().item()
        if said is None or value != said:
            words = "no scale" if said in (None, 1.0) else f"the scale {said:.6g}"
            raise FileError(f"{name} is {value:.6g}; nybble.json says that the KV cache has {words}.")
    return dict.fromkeys(names, "scales")


def _check_scheme(name: str, entry: dict[str, Any], weights: list[QTensor], stated: Mapping[str, Any]) -> None:
    group = group_of(name, stated)
    described: dict[str, Any] = {"weights": None, "input_activations": None, "output_activations": None}
    if "weight" in entry:
        described["weights"] = _args(weight_args, weights[entry["weight"]])
    for side, word in _SIDES.items():
        if side in entry:
            quantizer = ActivationQuantizer.from_dict(entry[side]).quantizer
            described[f"{word}_activations"] = _args(activation_args, quantizer)
    for key, args in described.items():
        _agree(name, f"{key.replace('_', ' ')} of ", args, None if group is None else group.get(key))


def _args(make: Callable[..., dict[str, Any]], *described: object) -> dict[str, Any]:
    try:
        return make(*described)
    except CannotError as error:
        raise FileError(f"nybble.json describes {error.came}, which compressed-tensors can't hold.") from error


def _agree(name: str, what: str, described: dict[str, Any] | None, said: Any) -> None:
    """Refuse arguments of config.json that aren't those of nybble's description."""
    if not isinstance(said, dict | None):
        raise FileError(f"{what}{name}: config.json says {said!r:.60}, which is no scheme.")
    ours = described and {key: _plain(value) for key, value in (dict.fromkeys(_OPTIONAL) | described).items()}
    theirs = said and {key: said.get(key) for key in ours or said}
    if (ours or None) == (theirs or None):
        return
    key = next(key for key in ours or theirs or () if (ours or {}).get(key) != (theirs or {}).get(key))
    first, second = (f"{key} = {found.get(key)!r:.40}" if found else "float" for found in (ours, theirs))
    raise FileError(
        f"{what}{name}: nybble.json says {first}, and config.json {second}. They describe one model: undo the change, "
        "or take nybble.json away to read the weights alone, as config.json says."
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, torch.dtype) else value


# -------------------------------------------------------------------------------------------------- from theirs to ours
def _as_described(prefix: str, found: QTensor, empty: BlockQTensor) -> dict[str, Tensor]:
    """The tensors of a weight that was read from the files, in the layout that nybble describes.

    Raises:
        FileError: it has values that this layout has not.
    """
    assert isinstance(found, BlockQTensor)
    try:
        params = QuantParams(_scale(found, empty), zero_point=_zero_point(found, empty))
        made = BlockQTensor(empty.format, empty.granularity, empty.shape, _codes(found, empty), params, empty.layout)
        tensors = made.tensors()
        from_spec(empty.spec(), tensors)
    except NybbleError as error:
        raise FileError(f"{prefix}: {error}") from error
    return tensors


def _codes(found: BlockQTensor, empty: BlockQTensor) -> Tensor:
    half = above(empty.format)
    if not half and found.layout == empty.layout:
        return found.codes
    codes: Tensor = get_layout(empty.layout).pack(found.unpacked().reshape(-1) ^ half, empty.format.bits)
    return codes


def _scale(found: BlockQTensor, empty: BlockQTensor) -> ScaleLike | None:
    wanted, scale = empty.params.scale, found.params.scale
    if isinstance(wanted, BlockQTensor):
        assert isinstance(scale, BlockQTensor)  # by the arguments, which agree
        outer = QuantParams(_outer(scale.params.scale, wanted.params.scale))
        return BlockQTensor(wanted.format, wanted.granularity, wanted.shape, scale.codes, outer, wanted.layout)
    assert isinstance(scale, Tensor)
    if wanted is None:
        if not bool((scale == 1).all()):
            raise FileError("it has scales, and nybble.json says that it has none.")
        return None
    assert isinstance(wanted, Tensor)
    return _narrowed(scale, wanted)


def _outer(stored: Any, wanted: Any) -> Tensor | Inverse | None:
    """The scale of E4M3 scales: the divisor of the files, or a factor, a power of two, that it is the reciprocal of."""
    if wanted is None:
        return None
    assert isinstance(stored, Inverse)
    if isinstance(wanted, Inverse):
        return Inverse(_narrowed(stored.divisor, wanted.divisor))
    return _narrowed(1 / stored.divisor, wanted)


def _narrowed(value: Tensor, wanted: Tensor) -> Tensor:
    made = value.to(wanted.dtype)
    if not torch.equal(made.float(), value.float()) and not bool(value.isnan().any()):
        kind = str(wanted.dtype).removeprefix("torch.")
        raise FileError(f"nybble.json says that its scales are {kind}, which can't hold those of the file.")
    return made.reshape(wanted.shape)


def _zero_point(found: BlockQTensor, empty: BlockQTensor) -> BlockQTensor | None:
    wanted, stored = empty.params.zero_point, found.params.zero_point
    if wanted is None:
        return None
    assert isinstance(wanted, BlockQTensor) and isinstance(stored, BlockQTensor)
    return BlockQTensor(
        wanted.format, wanted.granularity, wanted.shape, _codes(stored, wanted), QuantParams(None), wanted.layout
    )
