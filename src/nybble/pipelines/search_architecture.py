"""``nybble search MODEL OUT`` by a method that finds an architecture: OUT is a model folder like any other.

1. open the model, or the YAML file of a space; let the method check what it is asked
2. the method runs: its trainings and measurements stay in OUT.partial/work, so that a killed run goes on
3. config, weights, what stood beside the model; search.json, search.html, times.json; the folder appears
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nybble.checkpoint.marked import is_quantized
from nybble.checkpoint.parts import TIMES
from nybble.core.device import check_device, out_of_memory
from nybble.core.dtypes import float_dtype
from nybble.core.errors import ModelError, NybbleError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, atomic_write_bytes, atomic_write_json, atomic_write_text, check_new_folder
from nybble.core.options import at_least_one, settings_of
from nybble.core.progress import Progress, Silent
from nybble.core.seeds import preserve_global_rng
from nybble.core.versions import versions
from nybble.data.text import check_source
from nybble.models.sources import ModelSource
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.open import open_source
from nybble.pipelines.begun import REQUEST, begin
from nybble.recipe import read_yaml
from nybble.report.architecture import render
from nybble.search.architectures import Found, Study
from nybble.search.architectures._budget import parse_budget
from nybble.search.kept import Kept
from nybble.search.recipe import ArchitectureRecipe, SearchRecipe, load_search_recipe

WORK, MEASURED = "work", "measured.jsonl"


@dataclass(frozen=True, kw_only=True)
class ArchitectureSettings:
    """Sizes and places: ``seq_len`` is the most tokens of an example; the others as of any search."""

    seq_len: int = 256
    device: str = "cpu"
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        at_least_one(seq_len=self.seq_len)
        check_device(self.device)


@explicit_settings()
def search_architecture(
    model: str | Path,
    out: str | Path,
    *,
    budget: str,
    method: str | SearchRecipe,
    data: str | None = None,
    judged_on: str | None = None,
    options: Mapping[str, Any] | None = None,
    settings: ArchitectureSettings | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Find an architecture.

    Args:
        model: a float model; of methods that begin with a space its YAML file, which may name a model whose tokenizer
            or preparation of images is taken under ``like``.
        out: a folder to write: the found model, ``search.json``, ``search.html``, ``times.json``. It appears whole.
        budget: ``NAME=NUMBER``: up to 1 a share of the full network, above it a count.
        method: a search recipe by name, a YAML file, or one that was read.
        data: labelled examples to train on.
        judged_on: held-out ones.
        options: of the method, over the recipe's; ``{"retrain.steps": 10}`` reaches within.
        settings: sizes and places; a mapping has some of the fields.
        progress: told of each step.
        announce: gets lines for people.

    Returns:
        What search.json holds, and ``seconds`` of each training.

    Raises:
        UsageError: a budget that nothing meets (the message has the least). ModelError: a model that the method can't
            search, or one that is quantized. Nothing is left behind, but for OUT.partial of a run that had begun.
    """
    check_new_folder(out)
    recipe = method if isinstance(method, SearchRecipe) else load_search_recipe(method)
    if not isinstance(recipe, ArchitectureRecipe):
        raise UsageError(f"method {recipe.name!r} chooses formats, and no architecture; nybble.search takes it.")
    recipe = recipe.changed(options or {})
    chosen = settings_of(ArchitectureSettings, settings, "ArchitectureSettings")
    for src in (data, judged_on):
        if src is not None:
            check_source(src)
    study = Study(
        name=str(model), budget=parse_budget(budget, recipe.architecture.budgets), data=data, judged_on=judged_on,
        seq_len=chosen.seq_len, seed=chosen.seed, device=chosen.device, progress=progress or Silent(),
        announce=announce,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(preserve_global_rng())
        stack.enter_context(out_of_memory(chosen.device))
        source, study = _opened(recipe, study)
        recipe.architecture.check(study)
        return _searched(recipe, study, source, Path(out), chosen)


def _opened(recipe: ArchitectureRecipe, study: Study) -> tuple[ModelSource | None, Study]:
    """The study with its model, or its space; and where what stands beside the weights is."""
    if recipe.architecture.begins_with == "space":
        found = read_yaml(study.name, "space")
        if not isinstance(found, Mapping):
            raise UsageError(f"{study.name}: a space is a mapping; got {found!r}.")
        like = found.get("like")
        source = None if like is None else open_source(str(like))
        return source, replace(study, space=found, origin=source)
    if is_quantized(Path(study.name)):
        raise ModelError(f"{study.name} is quantized already; search in the float model that it was made from.")
    source = open_source(study.name)
    if source.packed_names() and isinstance(source, FolderSource):
        raise ModelError(f"{study.name} holds packed weights; search in the float model that it was made from.")
    made: Any = source.model(torch.float32, torch.device(study.device))
    return source, replace(study, model=made.eval(), origin=source)


def _searched(
    recipe: ArchitectureRecipe, study: Study, source: ModelSource | None, out: Path, settings: ArchitectureSettings
) -> dict[str, Any]:
    request = {
        "model": study.name, "method": recipe.to_dict(), "budget": {study.budget.name: float(study.budget.amount)},
        "data": study.data, "eval": study.judged_on, "space": dict(study.space),
        "settings": {key: value for key, value in asdict(settings).items() if key != "resume"},
    }  # fmt: skip
    with AtomicFolder(out, resumable=True) as partial:
        begin(partial, request, settings.resume)
        work = partial / WORK
        work.mkdir(exist_ok=True)
        study = replace(study, folder=work, keep=Kept(work / MEASURED))
        try:
            found = recipe.architecture.run(study)
        except NybbleError:
            if {path.name for path in work.iterdir()} <= {MEASURED}:  # nothing was trained
                shutil.rmtree(partial)
            raise
        result = _result(request, study, found)
        _save(found, source, partial)
        atomic_write_json(partial / "search.json", result)
        atomic_write_text(partial / "search.html", render(result, found.pictures))
        atomic_write_json(partial / TIMES, study.seconds)
        shutil.rmtree(work)
        (partial / REQUEST).unlink()
    return {**result, "seconds": study.seconds}


def _result(request: Mapping[str, Any], study: Study, found: Found) -> dict[str, Any]:
    """What search.json holds."""
    budget = study.budget
    return {
        "format_version": 1, "request": request, "unit": budget.unit, "limit": budget.limit(found.full),
        "cost": found.cost, "full": found.full, "measures": dict(found.measures), "score": found.score,
        "front": list(found.front), "compared": list(found.compared), "parts": list(found.parts),
        "encoding": dict(found.encoding), "versions": versions(),
    }  # fmt: skip


def _save(found: Found, source: ModelSource | None, folder: Path) -> None:
    """The model in the dtype that its source has, with what stood beside that."""
    given = getattr(None if source is None else source.config, "dtype", None)
    dtype = torch.float32 if given is None else given if isinstance(given, torch.dtype) else float_dtype(given, "dtype")
    found.model.to("cpu", dtype).save_pretrained(folder)
    if source is not None:
        source.write_side_files(folder)
    for name, content in found.files.items():
        atomic_write_bytes(folder / name, content)
