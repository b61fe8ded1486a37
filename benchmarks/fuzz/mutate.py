"""Damage to a model's files: bytes, JSON, and tensors that are sound as a file and wrong as a part of the model."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Files = dict[str, bytes]
Header = dict[str, Any]

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 5, 7, 16, 63, 255, 1 << 31, 1 << 32, 1 << 53, 1 << 62, 1 << 63, (1 << 64) - 1,
    10**30, 0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), "", "4", "group", "channel", "re:(", "re:.*",
    "../../etc/passwd", "re:(a+)+$", "(.*|a)*b", "/dev/zero", "x" * 3000, "\ud800", "\x00",
    [], [[]], [-1], [1 << 62] * 3, {}, {"a": {"b": []}},
    "float", "int", "gptq", "awq", "mxfp4", "bitsandbytes", "modelopt", "compressed-tensors", "nybble", "dense",
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 31, 32, 255, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 60,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
FILLS = (
    b"\x00", b"\xff", b"\x7f", b"\x80", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x00\x7c", b"\x01", b"\xff\x7f",
)  # fmt: skip


def damaged(files: Files, r: random.Random) -> tuple[str, Files]:
    """The files with one to three changes, and the name of the last one."""
    found, what = dict(files), ""
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        how = r.choice(WAYS if any(name.endswith(".safetensors") for name in found) else (bytes_, bytes_, cut))
        changed = how(found, r)
        what = how.__name__.strip("_")
        found = found if changed is None else changed
    return what, found


def bytes_(files: Files, r: random.Random) -> Files:
    """Bits flipped, numbers at their limits, bytes moved, put in or taken out; mostly near the start of a file."""
    name = r.choice(list(files))
    data = bytearray(files[name])
    for _ in range(r.choice((1, 1, 2, 5))):
        if not data:
            break
        reach = len(data) if r.random() < 0.3 else min(len(data), r.choice((8, 64, 4096)))
        at, how = r.randrange(reach), r.randrange(6)
        if how == 0:
            data[at] ^= 1 << r.randrange(8)
        elif how == 1:
            data[at] = r.randrange(256)
        elif how == 2:
            width = r.choice((4, 8))
            data[at : at + width] = (r.choice(NUMBERS) % (1 << (8 * width))).to_bytes(width, "little")
        elif how == 3:
            other, size = r.randrange(reach), r.randint(1, 40)
            data[at : at + size] = data[other : other + size]
        elif how == 4:
            data[at:at] = r.randbytes(r.randint(1, 9))
        else:
            del data[at : at + r.randint(1, 16)]
    return {**files, name: bytes(data)}


def cut(files: Files, r: random.Random) -> Files:
    """A file that ends too early, is empty, goes on too long, or isn't there."""
    name, how = r.choice(list(files)), r.randrange(4)
    data = files[name]
    if how == 0:
        return {n: d for n, d in files.items() if n != name} if len(files) > 1 else {name: b""}
    return {**files, name: (b"", data[: r.randrange(len(data) + 1)], data + r.randbytes(r.randint(1, 64)))[how - 1]}


def json_(files: Files, r: random.Random) -> Files | None:
    """A place in a JSON file replaced, renamed, repeated or left out; what describes the quantization most often."""
    names = [name for name in files if name.endswith(".json")]
    if not names:
        return None
    name = r.choice(names)
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError):
        return None
    key = "quantization_config"
    if isinstance(value, dict) and key in value and r.random() < 0.8:
        value[key] = spoilt(value[key], r)
    else:
        value = spoilt(value, r)
    return {**files, name: _text(value, r)}


def spoilt(value: Any, r: random.Random) -> Any:
    """A JSON value with one place in it changed."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        key, how = r.choice(list(value)), r.random()
        rest = {k: v for k, v in value.items() if k != key}
        if how < 0.1:
            return rest
        if how < 0.15:
            return {**rest, r.choice((*value, "x", "")): value[key]}
        return {**value, key: spoilt(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.8:
        place, how = r.randrange(len(value)), r.random()
        if how < 0.2:
            return value[:place] + value[place + 1 :]
        return [spoilt(v, r) if i == place else v for i, v in enumerate(value)] + value[:1] * (how < 0.3)
    if type(value) is int and r.random() < 0.5:
        return value + r.choice((-1, 1, value, -2 * value))
    return copy.deepcopy(r.choice(ODD))


def _text(value: Any, r: random.Random) -> bytes:
    text = json.dumps(value)
    if r.random() < 0.03:  # a name twice
        text = text.replace("{", '{"a": 1, "a": 2, ' if len(text) > 2 else '{"a": 1, "a": 2', 1)
    if r.random() < 0.02:
        text = "[" * 100_000 + text
    return text.encode()


def header(files: Files, r: random.Random) -> Files | None:
    """The header of safetensors changed as JSON, the bytes behind it kept: mostly a file that contradicts itself."""
    found = _opened(files, r)
    if found is None:
        return None
    name, head, body = found
    changed = spoilt(head, r)
    if isinstance(changed, dict) and r.random() < 0.2 and len(head) > 2:  # two tensors in one place
        names = [k for k in head if k != "__metadata__"]
        a, b = r.choice(names), r.choice(names)
        changed = {**head, a: head[b]}
    return {**files, name: _joined(_text(changed, r), body)}


def tensor(files: Files, r: random.Random) -> Files | None:
    """A sound file in which one tensor has another name, dtype, shape or size, or is missing."""
    found = _opened(files, r)
    if found is None:
        return None
    name, head, body = found
    tensors = _parts(head, body)
    if not tensors:
        return None
    key = r.choice(list(tensors))
    dtype, shape, data = tensors.pop(key)
    how = r.randrange(7)
    if how == 0:
        tensors[r.choice((f"{key}x", f"{key}.weight", f"{key}_scale", "", *tensors))] = (dtype, shape, data)
    elif how == 1:
        wide = r.choice([d for d, size in BYTES.items() if len(data) % size == 0])
        tensors[key] = (wide, [len(data) // BYTES[wide]], data)
        if BYTES.get(dtype) == BYTES[wide]:
            tensors[key] = (wide, shape, data)
    elif how == 2:
        tensors[key] = (dtype, r.choice((shape[::-1], [1, *shape], [*shape, 1], [math.prod(shape)])), data)
    elif how == 3 and shape and shape[0] and data:
        rows = r.choice((0, 1, shape[0] - 1, 2 * shape[0]))
        size = len(data) // shape[0]
        tensors[key] = (dtype, [rows, *shape[1:]], (data * 2)[: rows * size])
    elif how == 4 and shape:
        tensors[key] = (dtype, [*shape[:-1], 0], b"")
    elif how == 5 and shape and shape[-1] > 1 and dtype in BYTES:
        less, size = shape[-1] - 1, BYTES[dtype]
        kept = [data[i * size * shape[-1] :][: less * size] for i in range(math.prod(shape[:-1]))]
        tensors[key] = (dtype, [*shape[:-1], less], b"".join(kept))
    return {**files, name: _written(tensors)}


def numbers(files: Files, r: random.Random) -> Files | None:
    """A sound file in which a tensor holds other numbers: NaN, infinities, indices out of range, anything."""
    found = _opened(files, r)
    if found is None:
        return None
    name, head, body = found
    tensors = _parts(head, body)
    if not tensors:
        return None
    small = [k for k in tensors if len(tensors[k][2]) < 2000] or list(tensors)
    key = r.choice(small if r.random() < 0.7 else list(tensors))
    dtype, shape, data = tensors[key]
    changed, how = bytearray(data), r.randrange(3)
    if how == 0:
        fill = r.choice(FILLS)
        changed[:] = (fill * len(data))[: len(data)]
    for _ in range(0 if how == 0 or not data else r.choice((1, 4, 30))):
        at = r.randrange(len(changed))
        value = r.choice(FILLS) if how == 1 else bytes([r.randrange(256)])
        changed[at : at + len(value)] = value[: len(changed) - at]
    if key.endswith(".weight.quant_state.bitsandbytes__nf4") and r.random() < 0.7:  # JSON inside a tensor
        with suppress(ValueError, RecursionError):  # what another change has spoilt
            inner = _text(spoilt(json.loads(data), r), r)
            changed, shape = bytearray(inner), [len(inner)]
    tensors[key] = (dtype, shape, bytes(changed))
    return {**files, name: _written(tensors)}


def _opened(files: Files, r: random.Random) -> tuple[str, Header, bytes] | None:
    name = r.choice([n for n in files if n.endswith(".safetensors")] or [""])
    data = files.get(name, b"")
    try:
        size = struct.unpack("<Q", data[:8])[0]
        head = json.loads(data[8 : 8 + size])
    except (struct.error, ValueError, OverflowError, RecursionError):
        return None
    return (name, head, data[8 + size :]) if isinstance(head, dict) else None


def _parts(head: Header, body: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> dtype, shape, bytes; nothing of a header that another change has spoilt."""
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for name, entry in head.items():
        if name == "__metadata__":
            continue
        sound = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        if not sound or not isinstance(entry["dtype"], str) or len(_sizes(entry["data_offsets"])) != 2:
            return {}
        if _sizes(entry["shape"]) != entry["shape"]:
            return {}
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], list(entry["shape"]), body[begin:end])
    return found


def _sizes(value: Any) -> list[int]:
    """The list that it is, if it is one of sizes that a small file can have."""
    sound = isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 20 for n in value)
    return value if sound else []


def _written(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    head: Header = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    return _joined(json.dumps(head).encode(), b"".join(data for _, _, data in tensors.values()))


def _joined(text: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + body


WAYS: tuple[Callable[[Files, random.Random], Files | None], ...] = (
    json_, json_, json_, header, tensor, tensor, tensor, numbers, numbers, bytes_, cut,
)  # fmt: skip
