"""What an import brings with it, and that models load whichever of nybble and transformers comes first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny

from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe

BLOCKED = """
import sys

class Block:
    allowed = {"torch", "numpy"} | set(sys.stdlib_module_names) | {"nybble"}

    def find_spec(self, name, path=None, target=None):
        caller = sys._getframe(1)
        while caller and "importlib" in caller.f_code.co_filename:
            caller = caller.f_back
        inside = "nybble" in caller.f_globals.get("__name__", "") if caller else False
        if inside and name.partition(".")[0] not in self.allowed:
            raise AssertionError(f"{caller.f_globals['__name__']} imports {name}")

sys.meta_path.insert(0, Block())
"""


@cache
def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_nybble_is_light() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'safetensors', 'typer', 'rich', 'yaml', 'gguf'}"
    assert python(f"import sys, nybble; print({heavy} & set(sys.modules))") == "set()\n"


def test_the_command_line_answers_without_torch() -> None:
    """`nybble --help` doesn't wait for torch."""
    code = "import sys; from nybble.cli import build; build(); print('transformers' in sys.modules)"
    assert python(code) == "False\n"


def test_what_recipes_and_all_below_need() -> None:
    """torch and numpy alone: every module of the rows up to recipe.py, used once; YAML waits for a file."""
    rows = ("core", "formats", "packing", "rounding", "ops", "scales", "qtensor", "recipes", "learned", "optim")
    modules = ("granularity", "presets", "soft", "quantizer", "scheme", "recipe")
    code = f"""{BLOCKED}
import importlib, pkgutil
for row in {rows!r}:
    package = importlib.import_module(f"nybble.{{row}}")
    for found in pkgutil.walk_packages(package.__path__, f"nybble.{{row}}."):
        importlib.import_module(found.name)
for name in {modules!r}:
    importlib.import_module(f"nybble.{{name}}")
import torch
from nybble import Quantizer
from nybble.scheme import parse_scheme
Quantizer("nvfp4").quantize(torch.randn(4, 32)).dequantize()
parse_scheme({{"weights": "int4 group=32"}})
heavy = {{"transformers", "yaml", "safetensors", "typer", "gguf"}}
print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())
"""
    assert python(code) == "[] False\n"


ROUNDED = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import nybble.hard, nybble.quantizer, torch
    early = [str(w.message) for w in seen]
    loaded = [name for name in sys.modules if name.startswith("nybble.kernels")]
    x = torch.linspace(-9, 9, 4096).view(64, 64)
    lines = ("float4_e2m1fn group=32", "nf4 flat=64", "nvfp4")
    grid = nybble.qtensor.QuantParams(torch.ones(64), grid=torch.linspace(-8, 9, 16))
    for _ in range(2):
        codes = [nybble.quantizer.Quantizer(line).quantize(x).codes.tolist() for line in lines]
        codes += nybble.quantizer.Quantizer(lines[1]).quantize(x, grid).codes.tolist()  # ops that have no kernel
    late = [str(w.message) for w in seen[len(early):]]
after = [name for name in sys.modules if name.startswith("nybble.kernels.") and not name.startswith("nybble.kernels._")]
print(json.dumps([early, loaded, late, after, codes]))
"""


NAMES = ("cpu", "cpu_inputs", "cpu_products", "cpu_integers", "cpu_decoding", "cpu_optim")
CPU = [f"nybble.kernels.{name}" for name in NAMES]


def test_kernels_wait_for_the_first_use_of_their_device() -> None:
    early, loaded, late, after, codes = json.loads(python(ROUNDED))
    assert early == loaded == late == [] and after == CPU
    missing = "import sys; sys.modules['nybble.kernels'] = None"
    early, _, late, after, readable = json.loads(python(missing + ROUNDED))
    assert early == late == after == [] and readable == codes


def test_a_broken_kernel_is_named_once_and_left_out(tmp_path: Path) -> None:
    """Plug-ins that need a package which isn't there, for a device in use, one not in use, and none that torch has."""
    (tmp_path / "fast_kernels.py").write_text("import a_package_that_is_missing")
    info = tmp_path / "fast_kernels-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fast-kernels\nVersion: 0\n")
    names = "".join(f"{name} = fast_kernels\n" for name in ("cpu_fast", "cuda_fast", "abacus_fast"))
    (info / "entry_points.txt").write_text("[nybble.kernels]\n" + names)
    early, loaded, late, after, codes = json.loads(
        python(f"import sys; sys.path.insert(0, {os.fspath(tmp_path)!r})" + ROUNDED)
    )
    assert loaded == [] and after == CPU
    assert len(early) == 1 and "abacus_fast" in early[0] and "a_package" not in early[0]
    assert len(late) == 1 and "cpu_fast" in late[0] and "a_package_that_is_missing" in late[0] and "cuda" not in late[0]
    assert codes == json.loads(python(ROUNDED))[-1]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("imports")
    save_tiny(folder / "model", "llama")
    quantize(folder / "model", build_recipe("rtn", weights="nvfp4 group=16"), out=folder / "out")
    return folder / "out"


ORDERS = (
    "import nybble, transformers",
    "import transformers, nybble",
    "import nybble; from transformers import AutoModelForCausalLM",
)


def test_registration_in_either_order(out: Path) -> None:
    """Each in a process of its own, forked when nothing but torch, which takes longest, is there."""
    code = f"""
import os, sys, torch
torch.set_num_threads(1)
for order in {ORDERS!r}:
    child = os.fork()
    if not child:
        exec(order)
        import transformers
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained({os.fspath(out)!r})
        print(order, type(model.model.layers[0].mlp.up_proj).__name__, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    assert python(code).splitlines() == [f"{order} QuantLinear" for order in ORDERS]


WRONG = {
    "--weights 'flaot4 group=32'": "unknown format or preset 'flaot4'",
    "--weights 'int4 goup=32'": "unknown word 'goup'. Did you mean 'group'?",
    "--weights 'int4 group=abc'": "group=abc is not a size",
    "--weights 'int4 group=32 scale=mze'": "unknown scale rule 'mze'. Did you mean 'mse'?",
    "--weights 'int4 scale=mse(gird=3)'": "scale rule 'mse' has no option 'gird'",
    "--weights 'int4 rounding=half-awy'": "unknown rounding 'half-awy'",
    "--activations 'nf4 token packing=base3'": "packing=base3 stores ternary codes",
    "--activations 'float8_e4m3fn token scale=minmax'": "an integer zero point needs an integer format",
    "--embeddings 'int4 shifted scale=mse'": "shifted factors are column maxima (scale=absmax)",
    "--matmuls 'int9 token'": "integers have 1 to 8 bits; got 9",
    "--kv 'int4 channel'": "a KV cache grows token by token",
    "--scheme W4A61": "unknown scheme 'W4A61'. Did you mean 'W4A16'?",
    "--scheme scheme.yaml": "scheme.yaml: a scheme has no key 'wieghts'. Did you mean 'weights'?",
    "--recipe keys.yaml": "keys.yaml: a recipe has no key 'step'. Did you mean 'steps'?",
    "--recipe steps.yaml": "unknown solver 'rnt'. Did you mean 'rtn'?",
    "--recipe losses.yaml": "unknown reconstruction loss 'mze'. Did you mean 'mse'?",
    "--recipe rtm": "unknown recipe 'rtm'. Did you mean 'rtn'?",
    "--effort quik": "effort 'quik' is neither quick nor full",
    "--samples 0": "samples is 0; it must be 1 or more",
    "--device gpu": "device 'gpu' is neither cpu nor cuda",
    "--eval nosuch.txt": "data file 'nosuch.txt' does not exist",
}
ELSEWHERE = {
    "generate demo:smollm2 hi --kv 'int4 group=x'": "group=x is not a size",
    "generate demo:smollm2 ' '": "the prompt is empty",
    "eval demo:smollm2 --device gpu": "device 'gpu' is neither cpu nor cuda",
    "eval demo:smollm2 --seq-len 0": "seq_len is 0; it must be 1 or more",
    "formats flaot4": "unknown format or preset 'flaot4'",
    "recipes keys.yaml": "keys.yaml: a recipe has no key 'step'",
    "inspect flaot": "there is no flaot here",
    "report float": "float is not a model that nybble wrote",
    "quantize done out --recipe rtn": "done is already quantized (nybble); start from the float model",
    "quantize demo:smollm2 '' --recipe rtn": "the output folder's name is empty",
}


def test_mistakes_in_what_was_typed_are_answered_without_torch(tmp_path: Path) -> None:
    """Also names of parts, which are those of files, and options, which are fields of classes: both stay one list."""
    files = {
        "scheme": "wieghts: int4 channel", "keys": "step: []",
        "steps": "scheme: W4A16\nsteps: [{solver: rnt}]",
        "losses": "scheme: W4A16\nsteps: [{reconstruction: mze}]",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    for folder, config in (("float", {}), ("done", {"quantization_config": {"quant_method": "nybble"}})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    lines = {f"quantize demo:smollm2 out --recipe rtn {words}": said for words, said in WRONG.items()} | ELSEWHERE
    code = f"""
import contextlib, io, json, os, shlex, sys
from nybble.cli import build
os.chdir({os.fspath(tmp_path)!r})
found = {{}}
for line in {list(lines)!r}:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            build()(shlex.split(line))
        except SystemExit as done:
            found[line] = done.code, said.getvalue()
    assert "torch" not in sys.modules, line
print(json.dumps(found))
"""
    found = json.loads(python(code))
    assert [line for line, said in lines.items() if found[line][0] not in (1, 2) or said not in found[line][1]] == []
    assert {line for line, (number, _) in found.items() if number == 1} == {
        line for line in lines if any(words in line for words in ("--eval nosuch", "inspect", "report", " done "))
    }


def test_lines_are_read_without_torch() -> None:
    """By every part that a line can name, and every recipe."""
    code = """
import sys
from nybble import formats, granularity, packing, rounding, scales
for room in (formats, granularity, packing, rounding, scales):
    room.REGISTRY.all()
from nybble.presets import PRESETS
from nybble.recipe import load_recipe, recipe_names
from nybble.quantizer import Quantizer
print(len([Quantizer(name) for name in PRESETS] + [load_recipe(name) for name in recipe_names()]) > 50)
print("torch" in sys.modules)
"""
    assert python(code) == "True\nFalse\n"


def test_quantizing_needs_no_gguf() -> None:
    """What is no GGUF file is quantized where that package is missing."""
    code = "import sys; sys.modules['gguf'] = None; import nybble; nybble.quantize, nybble.preflight; print('done')"
    assert python(code) == "done\n"
