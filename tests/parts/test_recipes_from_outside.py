"""Recipes that another package offers."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.tiny import logits, tiny_model

import nybble
from nybble import recipe, recipes
from nybble.core.errors import UsageError

TEXT = "summary: theirs\nscheme: {weights: int4 group=16}\nsteps: [{solver: rtn}]\n"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "their_recipes"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"TEXT = {TEXT!r}\nMAPPING = {recipe.parse_yaml(TEXT, '')!r}\nNUMBER = 5\n")
    (folder / "in-a-file.yaml").write_text(TEXT)
    (folder / "alone.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("their_recipes")]:
        monkeypatch.delitem(sys.modules, name)
    values = {"in-a-file": "", "as_text": ":TEXT", "as-mapping": ":MAPPING", "number": ":NUMBER", "alone": ".alone"}
    theirs = [EntryPoint(name, f"their_recipes{value}", "nybble.recipes") for name, value in values.items()]
    select = SimpleNamespace(select=lambda group: theirs if group == "nybble.recipes" else [])
    monkeypatch.setattr("nybble.core.registry.plugins", lambda: select)
    fresh = recipes.Recipes("nybble.recipes", "recipe", recipes.REGISTRY.fits)
    for module in (recipe, recipes):
        monkeypatch.setattr(module, "REGISTRY", fresh)


@pytest.mark.parametrize("name", ["in-a-file", "as-text", "as-mapping"])
def test_they_are_recipes_like_others(name: str) -> None:
    assert name in recipe.recipe_names() and "gptq" in recipe.recipe_names()
    wanted, _ = nybble.quantize(tiny_model(), weights="int4 group=16")
    found, report = nybble.quantize(tiny_model(), name)
    assert torch.equal(logits(found), logits(wanted)) and report.manifest["recipe"]["summary"] == "theirs"


def test_what_is_none_is_named() -> None:
    with pytest.raises(UsageError, match=r"'number' of the package .* can't be imported \(it is a int, which is no re"):
        recipe.load_recipe("number")
    with pytest.raises(UsageError, match=r"alone is a module; name a package with alone\.yaml in it"):
        recipe.load_recipe("alone")
    with pytest.raises(UsageError, match=r"unknown recipe 'as-txt'. Did you mean 'as-text'"):
        recipe.load_recipe("as-txt")
