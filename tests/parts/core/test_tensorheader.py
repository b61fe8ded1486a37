from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from nybble.core.errors import FileError
from nybble.core.tensorheader import DTYPE_BITS, read_tensor_header

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def _file(path: Path, header: object, data: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def test_a_file_of_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(2, 3), "s": torch.tensor(1, dtype=torch.uint8), "e": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x", metadata={"k": "ä"})
    header = read_tensor_header(str(tmp_path / "x"))
    assert {name: (t.dtype, t.shape, t.nbytes) for name, t in header.tensors.items()} == {
        "w": ("F32", (2, 3), 24),
        "s": ("U8", (), 1),
        "e": ("F32", (0, 4), 0),
    }
    assert header.metadata == {"k": "ä"}
    assert header.data_start + 25 == (tmp_path / "x").stat().st_size


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert read_tensor_header(_file(tmp_path / "x", {}, data=0)).tensors == {}


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_its_size(tmp_path: Path, dtype: str) -> None:
    shape = [4, 3]  # a multiple of 4 elements: whole bytes for 6-bit dtypes too
    nbytes = 12 * DTYPE_BITS[dtype] // 8
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    assert read_tensor_header(_file(tmp_path / "x", {"a": entry}, nbytes)).tensors["a"].nbytes == nbytes


def _good(**changes: Any) -> dict[str, Any]:
    return {"a": {**GOOD, **changes}}


MALFORMED: dict[str, tuple[object, str]] = {
    "not JSON": (b"{'a': 1}", "header can't be read"),
    "cut JSON": (b'{"a": {"dtype": "F32", "sha', "header can't be read"),
    "empty": (b"", "header can't be read"),
    "not UTF-8": (b'{"\xff": 1}', "header can't be read"),
    "lone surrogate": (b'{"\\ud800": 1}', "header can't be read"),
    "deep": (b"[" * 100_000, "header can't be read"),
    "deep objects": (b'{"a":' * 100_000, "header can't be read"),
    "long integer": (b'{"a": ' + b"9" * 5000 + b"}", "header can't be read"),
    "a list": ([], "not a JSON object"),
    "a number": (3, "not a JSON object"),
    "null": (None, "not a JSON object"),
    "same name twice": (b'{"a": %b, "a": %b}' % ((json.dumps(GOOD).encode(),) * 2), "occurs twice"),
    "metadata list": ({"__metadata__": []}, "__metadata__ is not"),
    "metadata number": ({"__metadata__": {"a": 1}}, "__metadata__ is not"),
    "entry null": ({"a": None}, "needs exactly"),
    "entry list": ({"a": [1, 2]}, "needs exactly"),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 0]}}, "needs exactly"),
    "extra key": (_good(stride=[1]), "needs exactly"),
    "unknown dtype": (_good(dtype="F33"), "has dtype 'F33'; known: C64"),
    "dtype list": (_good(dtype=["F32"]), "has dtype"),
    "long dtype": (_good(dtype="F" * 10_000), "F…'; known"),
    "shape null": (_good(shape=None), "shape that is not a list"),
    "shape string": (_good(shape="23"), "shape that is not a list"),
    "shape float": (_good(shape=[2.0, 3]), "shape that is not a list"),
    "shape bool": (_good(shape=[True, 6]), "shape that is not a list"),
    "shape negative": (_good(shape=[-2, -3]), "shape that is not a list"),
    "shape nan": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}', "shape that is not a list"),
    "shape too long": (_good(shape=[1] * 65), "at most 64"),
    "shape huge": (_good(shape=[2**63]), "shape that is not a list"),
    "shape overflow": (_good(shape=[2**62, 16]), "does not fill its 24 bytes"),
    "offsets null": (_good(data_offsets=None), "data_offsets that are not"),
    "one offset": (_good(data_offsets=[24]), "data_offsets that are not"),
    "three offsets": (_good(data_offsets=[0, 24, 24]), "data_offsets that are not"),
    "offsets reversed": (_good(data_offsets=[24, 0]), "data_offsets that are not"),
    "offsets negative": (_good(data_offsets=[-24, 0]), "data_offsets that are not"),
    "too few bytes": (_good(data_offsets=[0, 20]), "does not fill its 20 bytes"),
    "too many bytes": (_good(shape=[2, 2]), "does not fill its 24 bytes"),
    "half a byte": (_good(dtype="F4", shape=[49]), "does not fill its 24 bytes"),
    "gap": (_good(data_offsets=[8, 32]), "leaves a gap"),
    "out of range": ({"a": GOOD, "b": {**GOOD, "data_offsets": [24, 48]}}, "take 48 bytes, and 24 follow"),
    "bytes left over": (_good(shape=[1], data_offsets=[0, 4]), "take 4 bytes, and 24 follow"),
    "overlap": ({"a": GOOD, "b": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]}}, "'b' overlaps"),
    "same place": ({"a": GOOD, "b": GOOD}, "'b' overlaps"),
    "empty inside": ({"a": GOOD, "b": {"dtype": "U8", "shape": [0], "data_offsets": [8, 8]}}, "overlaps"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_header_is_a_file_error_that_says_why(tmp_path: Path, case: str) -> None:
    header, why = MALFORMED[case]
    with pytest.raises(FileError) as caught:
        read_tensor_header(_file(tmp_path / "bad.safetensors", header))
    message = str(caught.value)
    assert "bad.safetensors: not a valid safetensors file: " in message
    assert why in message
    assert len(message) < 1000


def test_the_good_header_behind_those_cases_is_accepted(tmp_path: Path) -> None:
    assert read_tensor_header(_file(tmp_path / "x", {"a": GOOD})).tensors["a"].shape == (2, 3)


@pytest.mark.parametrize("length", [25, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + bytes(24))
    with pytest.raises(FileError, match="ends before its header does"):
        read_tensor_header(tmp_path / "x")


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", 10**8 + 1))
        file.truncate(2 * 10**8)  # sparse: takes no disk
    with pytest.raises(FileError, match="over the limit"):
        read_tensor_header(tmp_path / "x")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Is a directory"):
        read_tensor_header(tmp_path)
    with pytest.raises(FileError, match="nowhere: No such file"):
        read_tensor_header(tmp_path / "nowhere")
    with pytest.raises(FileError, match="null byte"):
        read_tensor_header("x\0y")


WHOLE = save({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int8)}, metadata={"k": "v"})


@pytest.mark.parametrize("kept", range(0, len(WHOLE), 7))
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    (tmp_path / "x").write_bytes(WHOLE[:kept])
    with pytest.raises(FileError):
        read_tensor_header(tmp_path / "x")


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_give_a_header_or_a_file_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(data)
    try:
        header = read_tensor_header(path)
    except FileError:
        return
    assert header.data_start + sum(entry.nbytes for entry in header.tensors.values()) == len(WHOLE)
