from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nybble.core import files, tensorfile
from nybble.core.errors import FileError
from nybble.core.tensorfile import Planned, merge_tensorfiles, stream_tensorfiles, write_tensorfile
from nybble.core.tensorheader import DTYPE_BITS, read_tensor_header

DTYPES = [
    torch.complex64, torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and _bytes(a[k]) == _bytes(b[k]) for k in a
    )


def _awkward() -> dict[str, Tensor]:
    """Odd sizes of mixed widths (alignment), a scalar, nothing, strides, shared memory, a name beyond ASCII."""
    base = torch.randn(7, 5)
    return {
        "a.bytes": torch.arange(3, dtype=torch.uint8),
        "b.weight": base,
        "c.transposed": base.T,
        "d.shared": base[2:4],
        "e.scalar": torch.tensor(2.5, dtype=torch.float64),
        "f.empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "g.half": torch.randn(3, dtype=torch.float16),
        "h.μ": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "i.grad": torch.nn.Parameter(torch.ones(1)).detach(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_loads_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    # 0 and 1 only: every byte pattern of them is valid in every dtype, bool included
    tensor = torch.randint(0, 2, (5 * torch.empty(0, dtype=dtype).element_size(),), dtype=torch.uint8).view(dtype)
    write_tensorfile(tmp_path / "x", {"t": tensor}, {})
    with safe_open(tmp_path / "x", framework="pt") as opened:
        loaded = opened.get_tensor("t")
    assert _same({"t": loaded}, {"t": tensor})


def test_awkward_tensors_load_back_aligned(tmp_path: Path) -> None:
    write_tensorfile(tmp_path / "x", tensors := _awkward(), {"format": "pt"})
    assert _same(load_file(tmp_path / "x"), tensors)
    header = read_tensor_header(tmp_path / "x")
    assert header.metadata == {"format": "pt"}
    assert header.data_start % 8 == 0
    for entry in header.tensors.values():
        assert (header.data_start + entry.begin) % (DTYPE_BITS[entry.dtype] // 8) == 0


def test_a_parameter_is_written_as_its_values(tmp_path: Path) -> None:
    write_tensorfile(tmp_path / "x", {"p": torch.nn.Parameter(torch.ones(2))}, {})
    assert torch.equal(load_file(tmp_path / "x")["p"], torch.ones(2))


def test_the_same_input_gives_the_same_bytes_in_any_order_and_process(tmp_path: Path) -> None:
    code = """
import sys, torch
from nybble.core.tensorfile import write_tensorfile
keys = [f"k{i}" for i in range(20)][:: int(sys.argv[2])]
tensors = {k: torch.full((3,), float(k[1:]), dtype=torch.float16 if k < "k4" else torch.float32) for k in keys}
write_tensorfile(sys.argv[1], tensors, {k: "v" for k in keys})
"""
    for name, order in (("x", "1"), ("y", "-1")):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name), order], check=True)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_what_safetensors_cannot_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"tensor 'z' has dtype torch\.complex128"):
        write_tensorfile(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex128)}, {})
    with pytest.raises(FileError, match="can't be called '__metadata__'"):
        write_tensorfile(tmp_path / "x", {"__metadata__": torch.zeros(1)}, {})
    assert os.listdir(tmp_path) == []


def _parts(folder: Path, tensors: dict[str, Tensor], cuts: int) -> list[Path]:
    """Spread ``tensors`` over files that each hold every ``cuts``-th name."""
    paths = []
    for i in range(cuts):
        paths.append(folder / f"part{i}")
        write_tensorfile(paths[-1], {name: tensors[name] for name in list(tensors)[i::cuts]}, {"part": str(i)})
    return paths


def test_merging_equals_what_the_parts_hold(tmp_path: Path) -> None:
    tensors = _awkward()
    out = tmp_path / "model.safetensors"
    assert merge_tensorfiles(_parts(tmp_path, tensors, 3), out, {"format": "pt"}) == [out]
    assert _same(load_file(out), tensors)
    assert read_tensor_header(out).metadata == {"format": "pt"}


def test_merged_bytes_do_not_depend_on_the_cuts(tmp_path: Path) -> None:
    tensors = _awkward()
    write_tensorfile(tmp_path / "whole", tensors, {"b": "1", "a": "2"})
    for cuts in (1, 2, 9):
        merge_tensorfiles(_parts(tmp_path, tensors, cuts)[::-1], tmp_path / "merged", {"a": "2", "b": "1"})
        assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_tensor_longer_than_a_chunk_is_streamed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "_CHUNK", 8)
    tensors = _awkward()
    merge_tensorfiles(_parts(tmp_path, tensors, 2), tmp_path / "merged", {})
    assert _same(load_file(tmp_path / "merged"), tensors)


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)} | {"t2": torch.zeros(100)}  # 40 bytes; 400
    parts = _parts(tmp_path, tensors, 2)
    (out := tmp_path / "out").mkdir()
    paths = merge_tensorfiles(parts, out / "model.safetensors", {"format": "pt"}, max_shard_bytes=80)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [path.name for path in paths] == [*shards, "model.safetensors.index.json"]
    assert sorted(os.listdir(out)) == sorted(path.name for path in paths)
    index = json.loads(paths[-1].read_text())
    assert index["metadata"] == {"total_size": 560}
    where = {"t0": 0, "t1": 0, "t2": 1, "t3": 2, "t4": 2}
    assert index["weight_map"] == {name: shards[i] for name, i in where.items()}
    loaded = {name: tensor for path in paths[:-1] for name, tensor in load_file(path).items()}
    assert _same(loaded, tensors)


def test_transformers_loads_the_shards(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    (out := tmp_path / "out").mkdir()
    merge_tensorfiles(_parts(tmp_path, weights, 2), out / "model.safetensors", {"format": "pt"}, 4096)
    config.save_pretrained(out)
    assert _same(LlamaForCausalLM.from_pretrained(out).state_dict(), dict(model.state_dict()))


def test_a_name_in_two_parts_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        write_tensorfile(path, {"w": torch.zeros(1)}, {})
    with pytest.raises(FileError, match=r"two: tensor 'w' is also in .*one\. Merge only one"):
        merge_tensorfiles([one, two], tmp_path / "out", {})


def test_no_parts_make_an_empty_file(tmp_path: Path) -> None:
    merge_tensorfiles([], tmp_path / "out", {"a": "b"})
    assert load_file(tmp_path / "out") == {}


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _parts(tmp_path, {"w": torch.zeros(1000)}, 1)
    monkeypatch.setattr(files, "free_bytes", lambda _: 5)
    with pytest.raises(FileError, match=r"out: 4,\d\d\d bytes are needed but 5 are free"):
        merge_tensorfiles(parts, tmp_path / "out", {})
    assert os.listdir(tmp_path) == ["part0"]


def test_a_disk_that_fills_up_during_the_last_shard_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = _parts(tmp_path, {f"t{i}": torch.zeros(10) for i in range(3)}, 1)
    (out := tmp_path / "out").mkdir()
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FileError, match=r"model-00003-of-00003\.safetensors: the disk is full\. \d+ bytes are needed"):
        merge_tensorfiles(parts, out / "model.safetensors", {}, max_shard_bytes=40)
    assert os.listdir(out) == []


def test_a_part_that_shrinks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (part,) = _parts(tmp_path, {"w": torch.zeros(100)}, 1)
    header = read_tensor_header(part)
    with part.open("r+b") as file:
        file.truncate(200)
    monkeypatch.setattr(tensorfile, "read_tensor_header", lambda _: header)
    with pytest.raises(FileError, match="part0: became shorter"):
        merge_tensorfiles([part], tmp_path / "out", {})
    assert os.listdir(tmp_path) == ["part0"]


def test_streamed_tensors_are_made_one_at_a_time_and_copied_ranges_are_read(tmp_path: Path) -> None:
    """The same bytes as tensors in memory give, in shards, and each is made once."""
    tensors = {f"t{i}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate((torch.float32, torch.bfloat16) * 3)}
    write_tensorfile(tmp_path / "whole.safetensors", tensors, {"format": "pt"})
    header = read_tensor_header(tmp_path / "whole.safetensors")
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return tensors[name]

    def planned(name: str) -> Planned:
        entry = header.tensors[name]
        if name in ("t0", "t3"):
            place = header.data_start + entry.begin
            return Planned(dtype=entry.dtype, shape=entry.shape, bytes_from=header.path, offset=place)
        return Planned(dtype=entry.dtype, shape=entry.shape, bytes_from=lambda: make(name))

    plans = {name: planned(name) for name in tensors}
    assert stream_tensorfiles(plans, tmp_path / "a.safetensors", {"format": "pt"}) == [tmp_path / "a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(made) == ["t1", "t2", "t4", "t5"]
    files = stream_tensorfiles(plans, tmp_path / "b.safetensors", {}, max_shard_bytes=100)
    assert [path.name for path in files][-1] == "b.safetensors.index.json" and len(files) > 3


def test_a_failing_maker_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise FileError("no")

    plans = {"a": Planned(dtype="F32", shape=(2,), bytes_from=fail)}
    with pytest.raises(FileError, match="no"):
        stream_tensorfiles(plans, tmp_path / "a.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_neighbours_are_copied_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands side by side in one file, there and here; bytes are those of tensors copied one by one."""
    tensors = {name: torch.full((40,), i, dtype=torch.uint8) for i, name in enumerate("abcd")}
    one, two = tmp_path / "one", tmp_path / "two"
    write_tensorfile(one, {name: tensors[name] for name in "abd"}, {})
    write_tensorfile(two, {name: tensors[name] for name in "cab"}, {})
    plans = {}
    for name, path in (("a", one), ("b", one), ("c", two), ("d", one)):
        header = read_tensor_header(path)
        begin = header.data_start + header.tensors[name].begin
        plans[name] = Planned(dtype="U8", shape=(40,), bytes_from=path, offset=begin)
    read: list[tuple[str, int]] = []
    chunks = tensorfile.file_chunks

    def noted(path: Path, begin: int, nbytes: int) -> Iterator[memoryview]:
        read.append((path.name, nbytes))
        return chunks(path, begin, nbytes)

    monkeypatch.setattr(tensorfile, "file_chunks", noted)
    made = Planned(dtype="U8", shape=(40,), bytes_from=lambda: tensors["a"] + 9)
    stream_tensorfiles(plans | {"e": made}, tmp_path / "out", {})
    assert read == [("one", 80), ("two", 40), ("one", 40)]
    found = load_file(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(found["e"], tensors["a"] + 9)
