"""Killed at any moment and resumed: the same bytes. The same request twice, too. Another request is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.e2e.processes import start
from tests.tiny import save_text, save_tiny, shortened

from nybble.checkpoint.marked import MANIFEST
from nybble.checkpoint.parts import TIMES, Parts
from nybble.cli import build
from nybble.core.errors import FileError, LearningError
from nybble.learned.lsq import LearnedScale
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe
from nybble.recipe import Recipe, parse_recipe, recipe_names
from nybble.walk.settings import Settings

BLOCKS = 5
RECIPES = {
    "float path": ["--recipe", "minmax-fp"],
    "quantized path": ["--recipe", "gptq", "--weights", "int4 group=16", "--spill"],
}
KILLS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    save_tiny(made / "model", "llama", num_hidden_layers=BLOCKS)
    save_text(made / "text.txt", 3000)
    return made


def command(folder: Path, out: Path, *options: str) -> list[str]:
    data = ["--data", str(folder / "text.txt"), "--samples", "16", "--seq-len", "24", "--batch", "4"]
    return ["quantize", str(folder / "model"), str(out), *data, *options]


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != TIMES}


def progress(partial: Path) -> int:
    """How far a run is, from what it has written: finished parts, then final files."""
    parts = len(list(partial.glob("parts/*.json")))
    return parts + 100 * (partial / "model.safetensors").exists() if partial.exists() else -1


@pytest.mark.parametrize("path", RECIPES)
def test_killed_at_random_moments(folder: Path, tmp_path: Path, path: str) -> None:
    """Kills of one run, each at a random moment after something new appeared on disk; then to the end."""
    whole, out, errors = tmp_path / "whole", tmp_path / "out", tmp_path / "errors"
    finished = start(command(folder, whole, *RECIPES[path]), errors)
    finished.join()
    assert finished.exitcode == 0, errors.read_text()
    partial, rng = out.with_name("out.partial"), random.Random(path)
    kills = 0
    while not out.exists():
        run = start(command(folder, out, *RECIPES[path], "--resume"), errors)
        before = progress(partial)
        while run.is_alive() and (kills == KILLS or progress(partial) <= before):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        run.kill()
        run.join()
        kills += run.exitcode == -signal.SIGKILL
        assert run.exitcode in (0, -signal.SIGKILL), errors.read_text()
        assert out.exists() == (run.exitcode == 0) or not partial.exists()
    assert kills >= KILLS // 2
    assert files(out) == files(whole)
    assert not partial.exists()


#: every recipe that nybble carries, as it is run on two blocks or three; and what a step can do that no recipe does yet
EVERY: dict[str, dict[str, Any]] = {
    **{name: {"weights": "int4 group=16"} for name in ("rtn", "mse", "gptq", "k-means", "outlier-columns")},
    **{name: {} for name in ("minmax-fp", "minmax-int", "smoothquant", "q-asr", "fpq8")},
    "bct": {},
    **{name: {"effort": "quick"} for name in ("fp4dit", "fpq", "vq4dit")},
    "hawq-v3": {"ignore": ["lm_head"]},
    **{name: {"effort": "quick"} for name in ("llm-fp4", "fp-baseline")},
    **{name: {"effort": "quick", "weights": "int4 group=16"} for name in ("adaround", "lwc", "flexround", "cbq")},
    **{n: {"effort": "quick", "weights": "int4 group=16 symmetric=false"} for n in ("signround", "efficientqat-ap")},
    "efficientqat": {"effort": "quick", "weights": "int4 group=16 symmetric=false"},
    "decoupleq": {"effort": "quick", "weights": "int2 group=16 symmetric=false"},
    "lorc": {"weights": "int4 group=16"},
    "omniquant": {"effort": "quick"},
    "ptq1.61": {"effort": "quick"},
    **{
        f"best-w{bits}a16": {"effort": "quick", "weights": f"int{bits} group=16 symmetric=false"} for bits in (4, 3, 2)
    },
    "best-w4a8": {"effort": "quick", "weights": "int4 group=16 symmetric=false", "activations": "int8 token"},
    "best-nvfp4": {"effort": "quick"},
    "best-mxfp4": {"effort": "quick", "weights": "mxfp4 group=16", "activations": "mxfp4-ct group=16"},
    "minifloat": {},
    "bfp-ksort": {"weights": "bfp16 group=16", "kv": "bfp12 group=8 sort=keys"},
    "minifloat-learned": {"effort": "quick"},
    "nvfp4": {},
    "quarot": {},
    "quarot-online": {},
    "spinquant": {"effort": "quick"},
    "k-quants": {"weights": "int4 group=16 scale=least-squares(offset=true)"},
    "zeroquant-fp": {"weights": "float4_e2m1fn group=16 scale=pow2-ratio"},
    "mxfp4": {"weights": "mxfp4 group=16", "activations": "mxfp4-ct group=16"},
    **{name: {"weights": "int4 group=16 symmetric=false"} for name in ("w4a16", "hqq", "awq")},
}  # fmt: skip
SCHEME = {"weights": "int4 group=16", "inputs": "int8 tensor static"}
PRODUCTS = {"rules": [{"targets": ["Attention"], "matmuls": "int8 tensor static"}, {"targets": ["Linear"], **SCHEME}]}
STEPS: dict[str, list[dict[str, Any]]] = {
    "transforms before a quantized path": [{"transform": "smooth"}, {"transform": "permute"}, {"solver": "gptq"}],
    "both paths beside each other": [{"transform": "smooth"}, {"solver": "gptq", "inputs": "both"}],
    "a rotation, corrections": [
        {"transform": "hadamard"}, {"solver": "rtn"}, {"correction": "refine-scales"},
        {"correction": "low-rank", "rank": 2}, {"correction": "bias"},
    ],
    "windows of two, side by side": [
        {"transform": "smooth"},
        {"reconstruction": "mse", "weights": "adaround", "inputs": "lsq", "window": 2, "steps": 4},
    ],
    "transforms learned in windows that overlap": [
        {"transform": "smooth"},
        {
            "reconstruction": "mse", "weights": "clip", "block": {"let": {"down": True}}, "window": 2, "overlap": 1,
            "steps": 2, "rates": {"transform": 0.01},
        },
        {"correction": "low-rank", "rank": 2},
    ],
    "windows that overlap": [
        {"transform": "smooth"},  # so that the truth is more precise than what the module holds
        {"solver": "gptq"},
        {"reconstruction": "mse", "weights": "adaround", "inputs": "lsq", "window": 2, "overlap": 1, "steps": 2},
        {"correction": "low-rank", "rank": 2},
    ],
    "rotations learned of all of it and in windows that overlap": [
        {"transform": "learned-rotation", "steps": 2, "batch": 2, "heads": False},
        {"solver": "gptq"},
        {
            "reconstruction": "mse", "block": "head-rotation", "window": 2, "overlap": 1, "steps": 2,
            "rates": {"rotation": 0.05},
        },
    ],
    "norms and biases in windows that overlap": [
        {"solver": "gptq"},
        {
            "reconstruction": "mse", "weights": "frozen-codes", "norms": True, "biases": True, "window": 2,
            "overlap": 1, "steps": 2, "rates": {"default": 0.01},
        },
    ],
}  # fmt: skip


def test_every_recipe_is_among_those() -> None:
    assert set(EVERY) == set(recipe_names())


def recipe_called(name: str) -> Recipe:
    if name in EVERY:
        return shortened(build_recipe(name, **EVERY[name]))
    scheme = PRODUCTS if name == "windows that overlap" else SCHEME
    return parse_recipe({"name": name, "scheme": scheme, "steps": STEPS[name]})


@pytest.mark.parametrize("name", [*EVERY, *STEPS])
def test_stopped_after_every_block(folder: Path, tmp_path: Path, name: str) -> None:
    """Each recipe, stopped when each of its blocks has just been written, and gone on from there: the same bytes."""
    recipe, model = recipe_called(name), tmp_path / "model"
    windows = any(step.options.get("window", 1) > 1 for step in recipe.steps)
    # Recipes of single blocks go on alike behind each; a window between two others has a carry of both kinds.
    blocks = 4 if name.startswith("windows") else 3 if windows or name in STEPS else 2
    save_tiny(model, "llama", num_hidden_layers=blocks)
    torch.set_num_threads(1)

    class Stop(BaseException):
        pass

    class Bar:
        def __init__(self, left: int) -> None:
            self.left = left

        def start(self, total: int, what: str) -> None: ...

        def advance(self, n: int = 1, note: str = "") -> None:
            self.left -= 1
            if not self.left:
                raise Stop

        def done(self) -> None: ...

    def run(out: Path, left: int) -> None:
        settings = Settings(samples=4, seq_len=8, batch=2, resume=True)
        quantize(model, recipe, str(folder / "text.txt"), out=out, settings=settings, progress=Bar(left))

    run(tmp_path / "whole", 0)
    stops = 0
    while not (tmp_path / "out").exists():
        with suppress(Stop):
            run(tmp_path / "out", stops + 1)
            break
        stops += 1
    assert stops >= min(blocks, 3)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_window_whose_training_fails_leaves_what_was_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the layer and the folder; once it can go on, it goes on there, to the same bytes."""
    step = {"reconstruction": "mse", "inputs": "lsq", "steps": 2}
    recipe = parse_recipe({"name": "failing", "scheme": SCHEME, "steps": [step]})
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=3)
    text, where = str(folder / "text.txt"), tmp_path
    again(where, tmp_path / "whole", recipe=recipe, data=text)

    twin = LearnedScale.estimate

    def fails(self: LearnedScale, x: Any) -> Any:
        return twin(self, x) * (torch.nan if list((tmp_path / "out.partial").glob("parts/block-0000.json")) else 1)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(LearnedScale, "estimate", fails)
        match = r"layers\.1\.\S*_proj gives NaN or Inf.*window-0001 is nan at step 0.*stays in .*out\.partial"
        with pytest.raises(LearningError, match=match):
            again(where, out, recipe=recipe, data=text)
    assert len(list((tmp_path / "out.partial").glob("parts/block-*.json"))) == 1 and not out.exists()
    again(where, out, recipe=recipe, data=text, resume=True)
    assert files(out) == files(tmp_path / "whole")


OPERATIONS = [(Path, "replace"), (Path, "unlink"), (Path, "rename"), (shutil, "rmtree")]


def meeting(patch: pytest.MonkeyPatch, met: Callable[[tuple[str, ...]], None]) -> None:
    """Let ``met`` be called just before each file operation, with its kind: a place in the code with what called it."""

    def meets(what: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            met(tuple(f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "nybble" in f.filename))
            return what(*args, **kwargs)

        return step

    for owner, operation in OPERATIONS:
        patch.setattr(owner, operation, meets(getattr(owner, operation)))


def ends(kinds: list[tuple[str, ...]]) -> list[int]:
    """Numbers of the first and the last of each kind."""
    last = len(kinds) - 1
    return sorted({i for kind in set(kinds) for i in (kinds.index(kind), last - kinds[::-1].index(kind))})


@pytest.mark.parametrize("name", ["minmax-fp", "gptq"])
def test_stopped_before_every_file_operation(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without chance: stopped just before each file operation, or the first and last of each kind, then resumed."""
    recipe, model = recipe_called(name), tmp_path / "model"
    save_tiny(model, "llama", num_hidden_layers=2)
    torch.set_num_threads(1)
    settings = Settings(samples=2, seq_len=8, batch=2, resume=True, spill=name == "gptq")
    limit = 1 << 30
    kinds: list[tuple[str, ...]] = []

    class Stop(BaseException):
        pass

    def met(kind: tuple[str, ...]) -> None:
        kinds.append(kind)
        if len(kinds) > limit:
            raise Stop

    def run(out: Path) -> None:
        quantize(model, recipe, str(folder / "text.txt"), out=out, settings=settings)

    with monkeypatch.context() as patch:
        meeting(patch, met)
        run(tmp_path / "whole")
        total, expected, seen = len(kinds), files(tmp_path / "whole"), kinds[:]
        assert total > 12
        for before in range(total) if name == "minmax-fp" else ends(seen):
            out = tmp_path / f"out{before}"
            kinds.clear()
            limit = before
            with pytest.raises(Stop):
                run(out)
            limit = 1 << 30
            if not out.exists():  # the last operation but one moves the folder; what follows only clears up
                run(out)
            assert files(out) == expected, before


def test_killed_before_file_operations_of_windows_that_overlap(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and last of each kind: what one run has on disk then, as a kill leaves it, is gone on from.

    From the walk on; what is written before it is the same for all recipes, and every file of that is met above.
    """
    recipe, model, run_in = recipe_called("windows that overlap"), tmp_path / "model", tmp_path / "run"
    save_tiny(model, "llama", num_hidden_layers=3)
    torch.set_num_threads(1)
    run_in.mkdir()
    kinds: list[tuple[str, ...]] = []

    def met(kind: tuple[str, ...]) -> None:
        shutil.copytree(run_in, tmp_path / str(len(kinds)))
        kinds.append(kind)

    def run(out: Path) -> None:
        settings = Settings(samples=2, seq_len=8, batch=2, resume=True)
        quantize(model, recipe, str(folder / "text.txt"), out=out, settings=settings)

    with monkeypatch.context() as patch:
        meeting(patch, met)
        run(run_in / "out")
    expected = files(run_in / "out")
    walk = next(i for i, kind in enumerate(kinds) if any("/walk/" in place for place in kind))
    chosen = [before for before in ends(kinds) if before >= walk]
    assert len(chosen) > 12
    for before in chosen:
        out = tmp_path / str(before) / "out"
        if not out.exists():
            run(out)
        assert files(out) == expected, before


def test_interrupted(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C: one line that says how to go on, exit code 1, and as JSON what went wrong."""
    out, errors = tmp_path / "out", tmp_path / "errors"
    run = start(command(folder, out, *RECIPES["quantized path"], "--json"), errors)
    while run.is_alive() and progress(out.with_name("out.partial")) < 2:
        time.sleep(0.001)
    assert run.pid is not None
    os.kill(run.pid, signal.SIGINT)
    run.join()
    text = errors.read_text()
    assert run.exitcode == 1, text
    error = json.loads(Path(f"{errors}.out").read_text())["error"]
    assert (error["type"], error["exit_code"]) == ("Interrupted", 1) and "--resume" in error["message"]
    assert text.strip().splitlines()[-1].startswith("nybble: interrupted.")
    assert f"{out}.partial" in text and "--resume" in text and "Traceback" not in text
    assert not out.exists() and out.with_name("out.partial").exists()


def interrupted(folder: Path, out: Path, **changes: Any) -> None:
    """Leave OUT.partial after three blocks, as a kill would."""

    class Stop(BaseException):
        pass

    class Bar:
        left = 3

        def start(self, total: int, what: str) -> None: ...

        def advance(self, n: int = 1, note: str = "") -> None:
            self.left -= 1
            if not self.left:
                raise Stop

        def done(self) -> None: ...

    with pytest.raises(Stop):
        again(folder, out, progress=Bar(), **changes)


def again(
    folder: Path, out: Path, *, progress: Any = None, data: str = "", recipe: Any = None, announce: Any = None,
    **settings: Any,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    chosen = Settings(**({"samples": 4, "seq_len": 8, "batch": 2} | settings))
    made = recipe or build_recipe("gptq", weights="int4 group=16")
    text = data or str(folder / "text.txt")
    quantize(folder / "model", made, text, out=out, settings=chosen, progress=progress, announce=announce)


def test_calibrated_scales_of_a_cache_are_kept(folder: Path, tmp_path: Path) -> None:
    """Those of the blocks that were finished before, too."""
    recipe = build_recipe("gptq", weights="int4 group=16", kv="float8_e4m3fn tensor static")
    again(folder, tmp_path / "whole", recipe=recipe)
    interrupted(folder, tmp_path / "out", recipe=recipe)
    again(folder, tmp_path / "out", recipe=recipe, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    held = load_file(tmp_path / "out" / "model.safetensors")
    scales = [float(t) for name, t in held.items() if name.endswith(("k_scale", "v_scale"))]
    assert len(scales) >= 6 and len(set(scales)) > 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, r"data.tokens_sha256|settings.seed"),
        ({"samples": 5}, r"data.samples = 4; now it is 5"),
        ({"seq_len": 9}, r"data.seq_len = 8; now it is 9"),
        ({"batch": 3}, r"settings.batch = 2; now it is 3"),
        ({"dtype": torch.float32}, r"settings.dtype = \"torch.bfloat16\""),
        ({"recipe": build_recipe("gptq", weights="int4 group=8")}, r"recipe.scheme.rules"),
        ({"recipe": build_recipe("rtn", weights="int4 group=16")}, r"recipe.name = \"gptq\"|data"),
    ],
)
def test_another_request_is_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    interrupted(folder, tmp_path / "out")
    kept = files(tmp_path / "out.partial")
    with pytest.raises(FileError, match=f"was begun with .*({named}).*without --resume"):
        again(folder, tmp_path / "out", resume=True, **changes)
    assert files(tmp_path / "out.partial") == kept


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    interrupted(folder, tmp_path / "out")
    (tmp_path / "other").mkdir()
    save_tiny(tmp_path / "other" / "model", "llama", num_hidden_layers=BLOCKS, seed=4)
    shutil.copy(folder / "text.txt", tmp_path / "other")
    with pytest.raises(FileError, match="was begun with model = "):
        again(tmp_path / "other", tmp_path / "out", resume=True, data=str(folder / "text.txt"))


def test_what_a_resumed_run_finds(tmp_path: Path) -> None:
    """Parts stay, spilled states go, whatever their stack; a folder killed just before it was moved is complete."""
    request = {"recipe": {"name": "rtn"}, "threads": 2}
    parts = Parts(tmp_path, request, resume=False)
    (parts.parts / "block-0000.json").write_text("{}")
    for name in ("hidden.bin.float.0", "hidden.bin.quantized.1"):
        (tmp_path / name).write_bytes(b"left by a killed run")
    again = Parts(tmp_path, request, resume=True)
    assert again.done("block-0000") and not again.assembled and not list(tmp_path.glob("hidden.bin*"))

    (tmp_path / MANIFEST).write_text(json.dumps({"recipe": {"name": "rtn"}, "layers": []}))  # machines aren't in it
    (tmp_path / "request.json").unlink()
    assert Parts(tmp_path, request, resume=True).assembled
    other = {**request, "recipe": {"name": "gptq"}}
    with pytest.raises(FileError, match=r'was begun with recipe.name = "rtn"; now it is "gptq"'):
        Parts(tmp_path, other, resume=True)
    fresh = Parts(tmp_path, other, resume=False)
    assert not fresh.assembled and not fresh.done("block-0000")


def test_without_resume_it_starts_anew_and_says_so_first(folder: Path, tmp_path: Path) -> None:
    """While what is cleared is still there; a run that goes on, or has nothing to clear, says nothing of it."""
    interrupted(folder, tmp_path / "out", seed=5)
    partial = tmp_path / "out.partial"
    (partial / "hidden.bin").write_bytes(b"left by a killed run")
    said: list[tuple[str, bool]] = []

    def announce(line: str) -> None:
        said.append((line, (partial / "parts" / "block-0000.json").exists()))

    again(folder, tmp_path / "out", announce=announce)
    assert [there for line, there in said if f"{partial} holds" in line and "--resume" in line] == [True]
    said.clear()
    again(folder, tmp_path / "fresh", announce=announce)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    interrupted(folder, tmp_path / "other")
    again(folder, tmp_path / "other", announce=announce, resume=True)
    assert said and not any("holds" in line for line, _ in said)


def test_the_command_says_that_it_starts_anew(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, in a dry run too, which clears nothing."""
    interrupted(folder, tmp_path / "out")
    before = files(tmp_path / "out.partial")
    plain = [*command(folder, tmp_path / "out"), "--recipe", "rtn", "--weights", "int4 group=16", "--json"]
    build()([*plain, "--dry-run"], standalone_mode=False)
    assert "--resume would go on" in " ".join(json.loads(capsys.readouterr().out)["preflight"])
    assert files(tmp_path / "out.partial") == before
    build()(plain, standalone_mode=False)
    given = capsys.readouterr()
    assert f"{tmp_path / 'out.partial'} holds what an earlier run finished" in given.err
    assert json.loads(given.out)["out"] == str(tmp_path / "out")


def test_resume_with_nothing_there(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    quantize(
        folder / "model", build_recipe("rtn", weights="int4 group=16"), out=tmp_path / "out",
        settings=Settings(resume=True), announce=lines.append,
    )  # fmt: skip
    assert any("nothing to resume" in line for line in lines)


def test_spilled_states_leave_no_trace(folder: Path, tmp_path: Path) -> None:
    again(folder, tmp_path / "memory")
    again(folder, tmp_path / "file", spill=True)
    assert files(tmp_path / "memory") == files(tmp_path / "file")


@pytest.mark.parametrize("weights", ["int4 group=16", "float4_e2m1fn group=16 rounding=stochastic"])
def test_same_bytes_twice_and_the_callers_randomness_stays(folder: Path, tmp_path: Path, weights: str) -> None:
    recipe = build_recipe("rtn" if "stochastic" in weights else "gptq", weights=weights)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    again(folder, tmp_path / "a", recipe=recipe)
    after = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert torch.equal(after[0], states[0]) and after[1:] == states[1:]
    torch.manual_seed(2)
    again(folder, tmp_path / "b", recipe=recipe)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    again(folder, tmp_path / "c", recipe=recipe, seed=1)
    assert files(tmp_path / "c")["model.safetensors"] != files(tmp_path / "a")["model.safetensors"]


def test_stochastic_activations_resume_alike(folder: Path, tmp_path: Path) -> None:
    recipe = build_recipe("gptq", weights="int4 group=16", activations="float8_e4m3fn token rounding=stochastic")
    again(folder, tmp_path / "whole", recipe=recipe)
    interrupted(folder, tmp_path / "out", recipe=recipe)
    again(folder, tmp_path / "out", recipe=recipe, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_stochastic_head_is_drawn_alike(tmp_path: Path) -> None:
    """Killed behind the last block: what was drawn for blocks is not drawn again before the head."""
    save_tiny(tmp_path / "model", "mistral", num_hidden_layers=3)
    save_text(tmp_path / "text.txt")
    scheme = {"weights": "int4 group=16 rounding=stochastic", "ignore": []}
    recipe = parse_recipe({"name": "drawn", "scheme": scheme, "steps": [{"solver": "rtn"}]})
    again(tmp_path, tmp_path / "whole", recipe=recipe)
    interrupted(tmp_path, tmp_path / "out", recipe=recipe)
    torch.rand(7)
    again(tmp_path, tmp_path / "out", recipe=recipe, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_no_times_and_no_places_in_the_files(folder: Path, tmp_path: Path) -> None:
    again(folder, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "nybble.json").read_text())
    assert set(manifest) == {
        "name", "format_version", "form", "model", "recipe", "data", "settings", "versions", "layers"
    }  # fmt: skip
    assert manifest["name"] == "model"
    text = "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))
    assert str(tmp_path) not in text and str(folder / "model") not in text
