"""Every block of code in README and docs does what it says: Python and commands are run, YAML is a recipe.

Real models are replaced by tiny ones, and ``builtin`` by its beginning: the words of a document stay as they are.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tests.tiny import save_tiny

from nybble.cli import main
from nybble.core.options import build
from nybble.core.registry import Registry
from nybble.data.sources import builtin
from nybble.data.text import make_source
from nybble.lab.sweep import parse_sweep
from nybble.models.sources import packages
from nybble.models.sources.folder import FolderSource
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.scheme import parse_scheme
from nybble.training.methods import METHODS
from nybble.training.recipe import parse_training_recipe
from nybble.walk.steps.make import check_quick

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block: where it begins, what it is, its text."""

    place: str
    kind: str
    text: str


def blocks() -> list[Block]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(f"{path.relative_to(ROOT)}:{line}", match[1], match[2]))
    return found


def named(kind: str) -> pytest.MarkDecorator:
    chosen = [block for block in blocks() if block.kind == kind]
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


def test_every_block_says_what_it_is() -> None:
    assert {block.kind for block in blocks()} <= {"python", "sh", "yaml", "toml", "text"}
    assert {"python", "sh", "yaml"} <= {block.kind for block in blocks()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough for the usual sequences, wide enough for the usual groups."""
    folder = tmp_path_factory.mktemp("documents") / "model"
    return save_tiny(folder, hidden_size=64, intermediate_size=128, max_position_embeddings=512)


@pytest.fixture
def place(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run a document in, where ``demo:`` means a tiny model."""
    torch.set_num_threads(1)
    whole = builtin.PART

    class Short:
        fallback = False
        accepts = staticmethod(whole.accepts)

        @staticmethod
        def read(src: str, part: Any, tokenizer: Any) -> Any:
            read = whole.read(src, part, tokenizer)
            return replace(read, documents=make_source([" ".join(read.documents)[:9000]], name="", note="").documents)

    monkeypatch.setattr(builtin, "PART", Short)
    monkeypatch.setattr(packages, "open_demo", lambda spec: FolderSource(spec, tiny))
    monkeypatch.chdir(tmp_path)
    for name in ("instructions", "held"):
        row = '{"instruction": "ba be", "output": "bi"}\n'
        (tmp_path / f"{name}.jsonl").write_text(row * 4)
    for block in blocks():
        if block.kind == "yaml" and block.place.startswith("docs/lab.md"):  # files under the names that they say
            (tmp_path / f"{yaml.safe_load(block.text)['name']}.yaml").write_text(block.text)
    return tmp_path


# PEFT asks transformers in words that its newest release calls old.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@named("python")
def test_python(block: Block, place: Path, tiny: Path) -> None:
    if '"out"' in block.text and 'out="out"' not in block.text:  # what an earlier block made
        import nybble

        nybble.quantize(tiny, weights="int4 group=64 scale_format=float16", out="out")
    exec(compile(block.text, block.place, "exec"), {"__name__": "document"})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@named("sh")
def test_commands(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``nybble`` is run; of ``make``, ``python`` and ``pip`` the target, the file or the extra must be there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in block.text.splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if Path(program).name == "nybble":
            monkeypatch.setattr("sys.argv", ["nybble", *arguments])
            with pytest.raises(SystemExit) as stop:
                main()
            assert not stop.value.code, line
        elif program == "make":
            assert arguments[0] in targets, line
        elif Path(program).name == "python":
            assert (ROOT / arguments[0]).is_file(), line
        elif program == "pip":
            assert arguments[0] == "install" and re.fullmatch(r"\.(\[\w+\])?", arguments[1]), line
            assert set(re.findall(r"\w+", arguments[1])) <= set(extras), line
        else:
            assert not program, line


@named("yaml")
def test_recipes(block: Block) -> None:
    if "docs/schemes.md" in block.place:
        scheme = parse_scheme(yaml.safe_load(block.text))
        assert parse_scheme(scheme.to_dict()) == scheme
        return
    if "docs/training.md" in block.place:
        training = parse_training_recipe(yaml.safe_load(block.text), block.place)
        method = METHODS.get(training.method)
        method.check(build(method.options_type, training.options, block.place), training.scheme)
        training.settings_with({})
        assert parse_training_recipe(training.to_dict()) == training
        return
    if "docs/lab.md" in block.place:
        sweep = parse_sweep(yaml.safe_load(block.text))
        assert not any(member.reason for member in sweep.expand())
        return
    recipe = parse_recipe(yaml.safe_load(block.text), block.place)
    check_quick(recipe)
    assert parse_recipe(recipe.to_dict()) == recipe


@named("toml")
def test_entry_points_name_groups_that_are_there(block: Block) -> None:
    for group in tomllib.loads(block.text)["project"]["entry-points"]:
        assert isinstance(importlib.import_module(group).REGISTRY, Registry)


def test_lines_of_tables_are_quantizers() -> None:
    """The first column of tables that are headed ``line``."""
    found = []
    for path in DOCUMENTS:
        for table in re.findall(r"^\| line \|.*?\n((?:\|.*\n)+)", path.read_text(), re.M):
            found += re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(found) >= 7
    for line in found:
        assert Quantizer(str(Quantizer(line))) == Quantizer(line)


@pytest.mark.parametrize("recipe", [None, "rtn"])
def test_a_folders_own_readme(tiny: Path, tmp_path: Path, recipe: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code loads it, whether a run or ``nybble.save`` wrote it, and it says what happens without nybble."""
    import nybble

    out = tmp_path / "out"
    if recipe:
        nybble.quantize(tiny, recipe, weights="int4 group=64", out=out, form="native")
    else:
        model, tokenizer = nybble.load(tiny)
        nybble.save(nybble.quantize(model, weights="int4 group=64")[0], out, tokenizer, form="native")
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n") and "random\nweights" in text.replace(
        " weights", "\nweights"
    )
    assert "# A quantized LlamaForCausalLM" in text and "import AutoModelForCausalLM" in text
    assert (
        "- `Linear`: weights `int4 group=64 scale_format=bfloat16`" in text
    )  # of a model saved from memory too: it remembers its run
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["model"].model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
    assert "random" in text and os.fspath(tmp_path) not in text
    assert nybble.load(".")[0] is not None


@pytest.mark.parametrize(
    ("config", "auto"),
    [
        ({"architectures": ["BertModel"], "model_type": "bert"}, "AutoModel"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "AutoModelForMaskedLM"),
        ({"architectures": ["ViTForImageClassification"], "model_type": "vit"}, "AutoModelForImageClassification"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "AutoModelForSeq2SeqLM"),
        ({"model_type": "nothing"}, "AutoModel"),
    ],
)
def test_a_card_names_the_class_that_loads(config: dict[str, Any], auto: str) -> None:
    from nybble.checkpoint.card import card

    assert f"from transformers import {auto}\n" in card(config, {})
