"""Mutated folders that nybble wrote: load, inspect and eval give nybble's own error or work; no code, no memory.

Seeded mutations of config.json, its quantization_config and safetensors headers: 400 of each kind of each model.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.numerics.test_fuzz_files import MAX_GROWTH, mutated_bytes, mutated_json, peak_bytes
from tests.tiny import save_text, save_tiny
from transformers.utils import logging

from nybble.checkpoint.account import inspect
from nybble.core.errors import NybbleError
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.load import load
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe
from nybble.walk.settings import Settings

MUTATIONS = 400  # of each kind and model
MODELS = {
    "integers": ("llama", "gptq", {"weights": "int4 group=16 symmetric=false", "activations": "int8 tensor static"}),
    "nested": ("gpt2", "rtn", {"weights": "nvfp4"}),
    "shifts, tied table, matmuls": (
        "llama",
        "llm-fp4",
        {"embeddings": "e2m1 channel", "matmuls": "e2m1 tensor static", "effort": "quick"},
    ),
    "experts": ("mixtral", "rtn", {"weights": "float4_e2m1fn group=16"}),
    "vectors": ("llama", "k-means", {}),
    "columns": ("llama", "outlier-columns", {}),
}
LINES = [
    "int4 group=99999999999",
    "e15m0",
    "float16_e15m0 tensor",
    "int4 flat=1",
    "nf4 rank1",
    "dynamic8 block=1x1",
    "(",
    "",
]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    family, name, options = MODELS[request.param]
    made = tmp_path_factory.mktemp("fuzz")
    save_tiny(made / "model", family)
    save_text(made / "text.txt", 100)
    recipe = build_recipe(name, **options)
    quantize(
        made / "model",
        recipe,
        str(made / "text.txt"),
        out=made / "out",
        settings=Settings(seq_len=8, batch=4),
        form="native",
    )
    return made


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In compressed-tensors' form, with nybble's description beside."""
    made = tmp_path_factory.mktemp("fuzz")
    save_tiny(made / "model", "llama")
    save_text(made / "text.txt", 100)
    recipe = build_recipe("gptq", **MODELS["integers"][2], kv="int8 token")
    settings = Settings(seq_len=8, batch=4)
    quantize(
        made / "model", recipe, str(made / "text.txt"), out=made / "out", settings=settings, form="compressed-tensors"
    )
    return made


@pytest.fixture(autouse=True)
def nothing_runs_and_memory_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("code from a model was about to be fetched or run")

    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", forbidden)
    monkeypatch.setattr("torch.load", forbidden)
    monkeypatch.setattr("builtins.input", forbidden)
    before = peak_bytes()
    yield
    assert peak_bytes() - before < MAX_GROWTH


def use(folder: Path, call: int) -> bool:
    """One of three uses; True if it worked, False if nybble refused. Anything else is the bug looked for."""
    out = folder / "out"
    try:
        if call == 0:
            load(out)
        elif call == 1:
            found = inspect(out)
            assert sum(found["bytes"].values()) == found["total"]
        else:
            run_eval({"model": str(out)}, str(folder / "text.txt"), metrics=["ppl"], seq_len=8, samples=2)
    except NybbleError as error:
        assert 10 < len(str(error)) < 5000
        return False
    return True


def targeted(config: dict[str, Any], rng: random.Random, path: tuple[str, ...] = ("quantization_config",)) -> bytes:
    """A mutation of one description or layout, whose effect reaches furthest; ``path``: where they are."""
    changed = json.loads(json.dumps(config))
    quantization = reduce(getitem, path, changed)
    layout = rng.choice(quantization["layouts"])
    modules = quantization["modules"]
    name = rng.choice(list(modules))
    spec = layout["spec"]
    match rng.randrange(10):
        case 0:
            spec["format"] = rng.choice(["int5", "e5m10", "float16_e15m0", "int99", "dybit8", "binary", 4])
        case 1:
            spec["granularity"] = rng.choice(
                ["tensor", "group=3", "flat=1", "block=99x99", "rank1", "group=16 pad=true"]
            )
        case 2:
            spec["shape"] = rng.choice([[2**40, 2**40], [0, 0], [-1, 32], [32], [32, 32, 1], ["a"], [10**30, 1]])
        case 3:
            tensors = layout["tensors"]
            tensors[rng.choice(list(tensors))] = rng.choice(
                [["uint8", [2**50]], ["float32", []], ["storage", [1]], [], 3]
            )
        case 4:
            modules[name] = {"class": rng.choice(["experts", "linear", "x"]), "weights": [10**9], "transposed": 1}
        case 5:
            modules[name]["weight"] = rng.choice([-1, 10**9, True, "0", None, 0.5])
        case 6:
            modules[rng.choice(["lm_head", "model", "", "a..b", f"{name}.weight", "model.embed_tokens"])] = modules[
                name
            ]
        case 7:
            modules[name]["inputs"] = {"quantizer": rng.choice(LINES), "static": rng.choice([["scale"], ["x"], 5, []])}
        case 8:
            del modules[name]
        case _:
            quantization[rng.choice(["format_version", "quant_method", "layouts", "modules"])] = rng.choice(
                [0, 2, {}, [], "x"]
            )
    return json.dumps(changed).encode()


@pytest.mark.parametrize("kind", ["config", "header"])
def test_mutations(folder: Path, kind: str) -> None:
    place = folder / "out" / ("config.json" if kind == "config" else "model.safetensors")
    data = place.read_bytes()
    config = json.loads(data) if kind == "config" else {}
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}} if config else {}
    (folder / "out" / "evil.py").write_text("raise SystemExit('ran')")
    outcomes = []
    try:
        for seed in range(MUTATIONS):
            rng = random.Random(seed)
            if kind == "config":
                new = targeted(config, rng) if seed % 2 else mutated_json(config, rng)
            else:
                new = mutated_header(data, rng, as_json=bool(seed % 2))
            place.write_bytes(new)
            outcomes.append(use(folder, seed % 3))
    finally:
        place.write_bytes(data)
        (folder / "out" / "evil.py").unlink()
    assert sum(outcomes) < MUTATIONS * 0.9  # most do harm
    assert kind == "header" or sum(outcomes) > MUTATIONS * 0.05  # and some don't: the rest of the way was taken
    assert all(use(folder, call) for call in range(3))


def test_mutations_of_two_files_that_have_to_agree(compressed: Path) -> None:
    """Of nybble.json's description, of compressed-tensors' config, and of the header."""
    names = ("nybble.json", "config.json", "model.safetensors")
    whole = {name: (compressed / "out" / name).read_bytes() for name in names}
    outcomes: dict[str, list[bool]] = {name: [] for name in names}
    for seed in range(MUTATIONS):
        rng, name = random.Random(seed), names[seed % 3]
        if name == "nybble.json":
            new = targeted(json.loads(whole[name]), rng, ("form", "quantization"))
        elif name == "config.json":
            new = mutated_json(json.loads(whole[name]), rng)
        else:
            new = mutated_header(whole[name], rng, as_json=bool(seed % 2))
        (compressed / "out" / name).write_bytes(new)
        outcomes[name].append(use(compressed, rng.randrange(3)))
        (compressed / "out" / name).write_bytes(whole[name])
    assert all(sum(found) < len(found) * 0.9 for found in outcomes.values())
    assert all(use(compressed, call) for call in range(3))


def mutated_header(data: bytes, rng: random.Random, as_json: bool) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    if not as_json:
        return mutated_bytes(data, rng, 8 + length)
    text = mutated_json(json.loads(data[8 : 8 + length]), rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
