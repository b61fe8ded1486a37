"""The exported C: bytes of a training step beside the emulation's, its memory, its errors."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.parts.microcontroller.networks import SHAPE, stack
from torch import Tensor, nn

from nybble.core.errors import DataError, UsageError
from nybble.microcontroller import compiler
from nybble.microcontroller.compiler import Library, built, find_compiler, make
from nybble.microcontroller.emulator import Emulator
from nybble.microcontroller.layer import identifier
from nybble.microcontroller.memory import memory
from nybble.microcontroller.networks import ds_cnn, resnet8
from nybble.microcontroller.project import reference_sample, tensors_of, write_project
from nybble.microcontroller.settings import Settings
from nybble.microcontroller.trace import stack_of

FAST = {"OPT": "-O1 -march=native"}


def _usable() -> bool:
    try:
        find_compiler()
    except UsageError:
        return False
    return True


compiles = pytest.mark.skipif(not _usable(), reason="no gcc 12 and make")


def expected(settings: Settings, lanes: int) -> tuple[float, dict[str, Tensor]]:
    """The emulation of the reference step: its loss, and every tensor by the name that C has for it."""
    emulator = Emulator(stack(), settings.arithmetic(lanes), update=settings.trained, loss=settings.loss)
    x, target = reference_sample(stack(), settings.dtype)
    held = {f"t{number}": tensor for number, tensor in enumerate(emulator.forward(x))}
    step = emulator.step(x, target, settings.rate, settings.decay)
    held |= {f"g{number}": tensor for number, tensor in step.carried.items()}
    for name, roles in emulator.weights.items():
        held |= {f"{identifier(name)}_{role}": value for role, value in roles.items()}
    for name, roles in step.gradients.items():
        held |= {f"d{identifier(name)}_{role}": value for role, value in roles.items()}
    return step.loss, held


@compiles
@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ({}, {"LANES": 1}),
        ({}, {"LANES": 2, "CORES": 2}),
        ({"fused": True, "loss": "berhu"}, {"LANES": 2, "UNROLL": 1}),
        ({"type": "bfloat16", "loss": "mse", "update": ("4.*", "14")}, {"LANES": 2, "UNROLL": 3}),
        ({"type": "bfloat16", "fused": True, "loss": "l1"}, {"LANES": 1, "UNROLL": 1}),
        ({"type": "float32", "lanes": 4}, {"LANES": 4}),
        ({"type": "float16", "lanes": 8}, {"LANES": 8}),
    ],
    ids=["scalar", "two-lanes-threads", "fused", "bf16", "bf16-fused", "float32", "eight-lanes"],
)
def test_every_byte_of_a_step_is_the_emulations(
    options: dict[str, object], variables: dict[str, int | str], tmp_path: Path
) -> None:
    settings = Settings(decay=0.01, rate=0.05, **options)  # type: ignore[arg-type]
    needs = write_project(stack(), tmp_path, settings)
    make(tmp_path, "all", **FAST, **variables)
    subprocess.run([built(tmp_path, "train", variables), "dump", "step.bin"], cwd=tmp_path, check=True)
    raw = (tmp_path / "step.bin").read_bytes()
    loss, wanted = expected(settings, int(variables["LANES"]))
    assert np.frombuffer(raw[:4], np.float32)[0] == np.float32(loss)
    at, shown = 4, tensors_of(needs)
    assert {array.name for array in shown} == set(wanted)
    for array in shown:
        size = array.count * settings.dtype.itemsize
        kind = torch.int32 if settings.dtype == torch.float32 else torch.int16
        held = wanted[array.name].contiguous().flatten().view(kind).numpy().tobytes()
        assert raw[at : at + size] == held, array.name
        at += size
    assert at == len(raw)


@compiles
def test_the_references_are_compared_and_others_named(tmp_path: Path) -> None:
    write_project(stack(), tmp_path, Settings())
    assert "31 tensors and the loss equal" in make(tmp_path, "check", OPT="-O0", LANES=2)
    with pytest.raises(DataError, match=r"no reference for TYPE=16 LANES=4"):
        make(tmp_path, "check", OPT="-O0", LANES=4)
    text = (tmp_path / "reference.h").read_text()
    name = "reference_2_dl_14_bias"
    changed = re.sub(rf"({name}\[5\] = {{\n  0x)(\w+)", lambda m: f"{m[1]}{int(m[2], 16) ^ 1:04x}", text)
    assert changed != text
    (tmp_path / "reference.h").write_text(changed)
    with pytest.raises(DataError, match=r"dl_14_bias\[0\] differs from the reference"):
        make(tmp_path, "check", OPT="-O0", LANES=2)


@compiles
@pytest.mark.parametrize(
    ("kind", "flags"), [("float16", "-fexcess-precision=fast"), ("float32", "-mfma -ffp-contract=fast")]
)
def test_a_build_that_rounds_otherwise_refuses_to_run(kind: str, flags: str, tmp_path: Path) -> None:
    write_project(stack(), tmp_path, Settings(type=kind))
    with pytest.raises(DataError, match=r"doesn't round every operation.*-ffp-contract=off -fexcess-precision=16"):
        make(tmp_path, "check", OPT="-O2", CFLAGS=flags)


@compiles
def test_memory_is_that_of_the_arrays(tmp_path: Path) -> None:
    needs = write_project(stack(), tmp_path, Settings(update=("4.*", "14")))
    make(tmp_path, OPT="-O0")
    program = built(tmp_path, "train", {})
    listed = subprocess.run(["nm", "-S", program], capture_output=True, text=True, check=True).stdout
    sizes = {m[3]: int(m[1], 16) for m in re.finditer(r"^\w+ (\w+) ([bBdD]) (\w+)$", listed, re.MULTILINE)}
    names = {array.name for array in needs.arrays}
    assert names <= set(sizes) and sum(sizes[name] for name in names) == needs.bytes
    assert names.isdisjoint({"g0", "g3", "scratch"}) and {"g4", "columns", "turned"} <= names
    # the paper's formulas: in + W + im2row + out, and with Co Hk Wk Hi Wi and the turned weight for the input
    held, taps = 8 * 36 + 6 * 8 * 9 + 6 * 9, 9
    assert needs.layers["4.first"] == (held + 8 * taps * 9, held + 8 * taps * 9, 0)
    whole = memory(stack(), torch.float16)
    assert whole.layers["4.first"][2] == held + 6 * taps * 36 + 6 * 8 * 9 and whole.bytes > needs.bytes
    assert {"g3", "scratch"} <= {array.name for array in whole.arrays} and "g0" not in {a.name for a in whole.arrays}
    assert memory(stack(), torch.float32).bytes > 1.9 * whole.bytes
    with pytest.raises(UsageError, match=r"(?s)needs [\d,]+ bytes .*the limit is 1,000\. Train fewer.*\n4\.first "):
        write_project(stack(), tmp_path / "none", Settings(memory=1000))
    assert not (tmp_path / "none").exists()


@compiles
def test_a_library_trains_as_the_emulation(tmp_path: Path) -> None:
    settings = Settings(update=("14",))
    write_project(stack(), tmp_path, settings)
    trained = Library(tmp_path, torch.float16, 5, LANES=2, **FAST)
    emulator = Emulator(stack(), settings.arithmetic(2), update=["14"])
    drawn = torch.Generator().manual_seed(0)
    for number in range(6):
        x, target = torch.randn(SHAPE, generator=drawn).half(), nn.functional.one_hot(torch.tensor(number % 5), 5)
        assert trained.step(x, target, 0.1, 0.01) == emulator.step(x, target, 0.1, 0.01).loss
    assert torch.equal(trained.tensor("l_14_weight", 35), emulator.weights["14"]["weight"].flatten())
    assert torch.equal(trained.forward(x), emulator.forward(x)[-1].float())
    with pytest.raises(DataError, match="no array 'l_9'"):
        trained.tensor("l_9", 1)


@compiles
@pytest.mark.parametrize(
    ("network", "shape"),
    [(resnet8(1, 3, 2, "batch"), (1, 8, 8)), (ds_cnn(1, 3, 3), (1, 9, 6))],
    ids=["resnet8", "ds-cnn"],
)
def test_the_papers_networks_in_both_kinds_of_kernels(
    network: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    write_project(stack_of(network, shape), tmp_path, Settings())
    for lanes in (1, 2):
        assert "equal to the reference" in make(tmp_path, "check", LANES=lanes, **FAST)


def test_what_settings_and_compilers_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for options, words in (
        ({"cores": 0}, r"cores is 0; it must be 1 or more"),
        ({"unroll": 64}, r"unroll is 64"),
        ({"lanes": 6}, r"lanes is 6"),
        ({"type": "float61"}, r"no type 'float61'\. Did you mean 'float16'"),
        ({"loss": "nll"}, r"no loss 'nll'"),
        ({"rate": float("nan")}, r"rate is a finite number; got nan"),
        ({"rate": "fast"}, r"c_train: rate"),
    ):
        with pytest.raises(UsageError, match=words):
            Settings(**options)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"gcc isn't on the path.*apt-get install gcc make"):
        find_compiler()
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "version", lambda name: "9.4.0")
    if shutil.which("gcc") and shutil.which("make"):
        with pytest.raises(UsageError, match=r"gcc 9\.4\.0 is too old"):
            find_compiler()
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    nn.init.constant_(network[0].weight, 1e6)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"^0: its weight has values that float16 can't hold"):
        write_project(stack_of(network, (1, 4, 4)), tmp_path, Settings())
