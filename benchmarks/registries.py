"""Tables of what there is, from the registries: formats, granularities, scale rules, presets, schemes, recipes, steps.

tables.py puts them into docs/; what a part does is the first line of its module, what its options mean its class says.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import yaml

from nybble import (
    corrections,
    export,
    granularity,
    learned,
    optim,
    packing,
    reconstruction,
    rounding,
    scales,
    solvers,
    transforms,
)
from nybble import formats as number_formats
from nybble.core.registry import Registry
from nybble.formats import Family, format_names, get_format
from nybble.kv_format import KVFormat
from nybble.learned import transforms as learned_transform
from nybble.matmul_format import MatmulFormat
from nybble.models import adapter
from nybble.optim._presets import SUFFIXES
from nybble.presets import PRESETS
from nybble.quantizer import Quantizer
from nybble.recipe import Step, load_recipe, recipe_names
from nybble.scheme import PRESETS as SCHEMES
from nybble.scheme import Rule, Scheme
from nybble.training import steps as training_steps
from nybble.training.callbacks import CALLBACKS
from nybble.training.coreset import CoresetOptions
from nybble.training.losses import LOSSES
from nybble.training.methods import METHODS
from nybble.training.recipe import listed_training_recipes
from nybble.training.scores import SCORES
from nybble.training.settings import TrainSettings
from nybble.training.tasks import TASKS, Task
from nybble.two_sets import TWO_SETS

NO_DEFAULT = (dataclasses.MISSING, None, "", ())
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Any: "anything",
    Quantizer: "quantizer line",
    KVFormat: "KV line",
    MatmulFormat: "operands' line",
    Rule: "rule",
    learned.Part: "learned part",
    learned_transform.LearnedTransform: "learned transform",
}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table of Markdown; all columns but the first are numbers (aligned right), or none."""
    ruler = ["---", *(("---:" if numbers else "---") for _ in columns[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (columns, ruler, *rows))


# ------------------------------------------------------------------------------------------------ what the sources say
def _markdown(text: str) -> str:
    """A docstring's text in a cell."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    return text.replace("|", "\\|")


def _says(registry: Registry, name: str) -> str:
    """The first line of a part's module."""
    found = importlib.import_module(f"{registry.package}.{name.replace('-', '_')}").__doc__ or ""
    return _markdown(found.strip().splitlines()[0])


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.init] if dataclasses.is_dataclass(kind) else []


def _meanings(kind: Any) -> dict[str, str]:
    """What a class's docstring, and its bases', says of its fields: ``low, high: the range`` or "``p``: the power."."""
    names = "|".join(sorted((field.name for field in _fields(kind)), key=len, reverse=True))  # mix_by before mix
    found: dict[str, str] = {}
    for cls in inspect.getmro(kind):
        text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        word = rf"(?:``)?(?:{names})(?:``)?"
        entry = rf"(?:^ *|[.;] )({word}(?:, {word})*): "
        starts = list(re.finditer(entry, text, re.MULTILINE)) if names else []
        ends = [*(after.start() for after in starts[1:]), len(text)]
        for start, end in zip(starts, ends, strict=False):
            meaning = re.split(r"\n\n|\n {,4}\w+(?:, \w+)*: ", text[start.end() : end])[0]
            for name in re.findall(names, start[1]):
                found.setdefault(name, _markdown(meaning).rstrip(" .;"))
    return found


def _kind(hint: Any) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(kind) for kind in inner if kind is not type(None))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"list, each: {_kind(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping, each: {_kind(inner[1])}"
    return WORDS.get(hint) or str(hint.__name__)


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value in NO_DEFAULT:
        return "needed" if value is dataclasses.MISSING and field.default_factory is dataclasses.MISSING else ""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`".replace("|", "\\|")
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _options(kind: Any, without: Sequence[str] = ()) -> list[list[str]]:
    """Rows of a class's options: name, kind, default, meaning."""
    hints, meanings = typing.get_type_hints(kind), _meanings(kind)
    return [
        [f"`{f.name}`", _kind(hints[f.name]), _default(f), meanings.get(f.name, "")]
        for f in _fields(kind)
        if f.name not in without
    ]


def _short_options(kind: Any) -> str:
    """A class's options in one cell."""
    rows = [
        f"{name} ({what}{f', {default}' if default else ''}){f': {says}' if says else ''}"
        for name, what, default, says in _options(kind)
    ]
    return "; ".join(rows)


def _parts(registry: Registry) -> dict[str, Any]:
    found: dict[str, Any] = registry.all()
    return found


# ------------------------------------------------------------------------------------------------------------- lines
def words() -> str:
    """The words of a quantizer line: the table in the docstring of nybble.quantizer."""
    lines = (importlib.import_module("nybble.quantizer").__doc__ or "").splitlines()
    first, second, last = (i for i, line in enumerate(lines) if line.startswith("==="))
    width = lines[first].index(" ")
    rows: list[list[str]] = []
    for line in lines[second + 1 : last]:
        if line[:width].strip():
            rows.append([f"`{line[:width].strip()}`", line[width:].strip()])
        else:
            rows[-1][1] += f" {line.strip()}"
    return table(("word", "meaning (default)"), [[word, _markdown(text)] for word, text in rows], numbers=False)


def format_families() -> str:
    """Formats by file: names or the pattern of a family."""
    rows = []
    for name, part in _parts(number_formats.REGISTRY).items():
        family = isinstance(part, Family)
        spelled = part.listed[:3] or (f"{name}[...]",) if family else (part.name, *part.aliases)
        more = ", ..." if family and len(part.listed) > 3 else ""
        rows.append([", ".join(f"`{word}`" for word in spelled) + more, _says(number_formats.REGISTRY, name)])
    return table(("format", "what it is"), rows, numbers=False)


def formats() -> str:
    """All listed formats."""
    made = [get_format(name) for name in format_names()]
    rows = [
        [f"`{f.name}`", str(f.bits), str(len(f.grid)), f"{f.min:g}", f"{f.max:g}", f"{f.smallest:.4g}"] for f in made
    ]
    return table(("format", "bits", "values", "smallest", "largest", "least above zero"), rows)


def presets() -> str:
    """All quantizer presets."""
    return table(("preset", "quantizer"), [[f"`{name}`", f"`{line}`"] for name, line in PRESETS.items()])


def granularities() -> str:
    """All granularities."""
    rows = []
    for name, part in _parts(granularity.REGISTRY).items():
        spelled, _, says = _says(granularity.REGISTRY, name).partition(": ")
        meanings = {field: f"`{field}`: " * (field in part.options) + text for field, text in _meanings(part).items()}
        rows.append([spelled, f"`{part.example}`", says[0].upper() + says[1:], "; ".join(meanings.values())])
    return table(("word", "for instance", "who shares a scale", "its number, its option"), rows, numbers=False)


def scale_rules() -> str:
    """All scale rules."""
    rows = [
        [f"`{name}`", _says(scales.REGISTRY, name), _short_options(part)]
        for name, part in _parts(scales.REGISTRY).items()
    ]
    return table(("rule", "scale of a block", "options"), rows, numbers=False)


def roundings() -> str:
    """All roundings."""
    rows = [[f"`{name}`", _says(rounding.REGISTRY, name)] for name in _parts(rounding.REGISTRY)]
    return table(("rounding", "meaning"), rows, numbers=False)


def packings() -> str:
    """All packings."""
    rows = [[f"`{name}`", _says(packing.REGISTRY, name)] for name in _parts(packing.REGISTRY)]
    return table(("packing", "bytes"), rows, numbers=False)


# ------------------------------------------------------------------------------------------------------------ models
def families() -> str:
    """Model families that are known by name."""
    rows = []
    for name, part in _parts(adapter.REGISTRY).items():
        kinds = ", ".join(f"`{kind}`" for kind in part.model_types)
        folds = len(part.norm_folds) + len(part.linear_folds)
        rows.append([kinds, _says(adapter.REGISTRY, name), part.reads, str(folds) if folds else "none"])
    return table(("`model_type`", "what it is", "calibrated on", "fold pairs"), rows, numbers=False)


# ----------------------------------------------------------------------------------------------------------- schemes
def rule_keys() -> str:
    """Keys of a rule."""
    return table(("key", "kind", "default", "meaning"), _options(Rule), numbers=False)


def scheme_keys() -> str:
    """Keys of a scheme with rules."""
    return table(("key", "kind", "default", "meaning"), _options(Scheme), numbers=False)


def scheme_presets() -> str:
    """All schemes by name."""
    rows = [[f"`{name}`", f"`{w}`", f"`{inputs}`" if inputs else "float"] for name, (w, inputs) in SCHEMES.items()]
    return table(("scheme", "weights", "inputs"), rows, numbers=False)


def two_sets() -> str:
    """Schemes of binary and ternary networks, and of vision transformers."""
    rows = [
        [f"`{name}`", *(f"`{line}`" if line else "" for line in (*lines[:4], *(lines.ends or ("", ""))))]
        for name, lines in TWO_SETS.items()
    ]
    titles = ("scheme", "weights", "embeddings", "activations", "never negative", "ends: weights", "ends: inputs")
    return table(titles, rows, numbers=False)


def train_callbacks() -> str:
    """What looks at weights at every update of a training."""
    rows = [[f"`{name}`", _says(CALLBACKS, name), _short_options(part)] for name, part in _parts(CALLBACKS).items()]
    return table(("name", "what", "options"), rows, numbers=False)


# ----------------------------------------------------------------------------------------------------------- recipes
def recipes() -> str:
    """All named recipes."""
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        rule = recipe.scheme.rules[0]
        own = (("weights", rule.weights), ("inputs", rule.inputs), ("kv", recipe.scheme.kv))
        lines = [f"{key}: `{line}`" for key, line in own if line]
        steps = " → ".join(map(_step, recipe.steps))
        rows.append([f"`{name}`", _markdown(recipe.summary), steps, ", ".join(lines), _markdown(recipe.source)])
    return table(("recipe", "what it does", "steps", "its own scheme", "source"), rows, numbers=False)


def _step(step: Step) -> str:
    options = yaml.safe_dump(dict(step.options), default_flow_style=True, sort_keys=False, width=1000).strip()
    return f"`{step.name}`" + (f" `{_markdown(options)}`" if step.options else "")


def _steps(registry: Registry, base: Any) -> str:
    """A paragraph and a table of options for each part of a registry; ``base``: whose options are told elsewhere."""
    shared = [field.name for field in _fields(base)]
    found = []
    for name, part in _parts(registry).items():
        rows = _options(part, shared)
        head = f"**`{name}`**: {_says(registry, name)}\n"
        found.append(head + ("\n" + table(OPTIONS, rows, numbers=False) if rows else ""))
    return "\n".join(found)


OPTIONS = ("option", "kind", "default", "meaning")


def transform_steps() -> str:
    """All transforms."""
    return _steps(transforms.REGISTRY, transforms.Transform)


def solver_steps() -> str:
    """All solvers."""
    return _steps(solvers.REGISTRY, solvers.Solver)


def reconstruction_options() -> str:
    """The engine's options."""
    return table(OPTIONS, _options(reconstruction.Reconstruction), numbers=False)


def reconstruction_steps() -> str:
    """All losses."""
    return _steps(reconstruction.REGISTRY, reconstruction.Reconstruction)


def learned_parts() -> str:
    """All learned parts."""
    return _steps(learned.REGISTRY, learned.Part)


def learned_transforms() -> str:
    """All learned transforms."""
    return _steps(learned_transform.REGISTRY, learned_transform.LearnedTransform)


def train_steps() -> str:
    """All trainings of the float model."""
    return _steps(training_steps.REGISTRY, training_steps.TrainStep)


def correction_options() -> str:
    """What every correction has."""
    return table(OPTIONS, _options(corrections.Correction), numbers=False)


def correction_steps() -> str:
    """All corrections."""
    return _steps(corrections.REGISTRY, corrections.Correction)


# ----------------------------------------------------------------------------------------------------------- targets
# ---------------------------------------------------------------------------------------------------------- training
def optimizers() -> str:
    """Update rules, their states and options."""
    rows = [
        [f"`{part.__name__}`", _says(optim.REGISTRY, name), ", ".join(f"`{state}`" for state in part.states),
         ", ".join(f"`{field.name}` {_default(field)}".strip() for field in _fields(part.options_type))]
        for name, part in _parts(optim.REGISTRY).items()
    ]  # fmt: skip
    return table(("name", "what", "states", "options"), rows, numbers=False)


def optimizer_presets() -> str:
    """What the end of a preset's name stands for."""
    rows = [
        [f"`{name}`", _markdown(suffix.about), f"`{suffix.state}`", f"{suffix.min_size:,}"]
        for name, suffix in SUFFIXES.items()
    ]
    return table(("end of the name", "states", "`state=`", "elements from which on"), rows, numbers=False)


def train_recipes() -> str:
    """Recipes of ``nybble train``."""
    rows = []
    for recipe in listed_training_recipes():
        (rule, *_) = recipe.scheme.rules
        own = ", ".join(f"`{name} {value}`" for name, value in recipe.settings.items())
        rows.append(
            [
                f"`{recipe.name}`",
                recipe.summary,
                f"`{recipe.scheme.name or rule.weights}`",
                f"`{recipe.method}`",
                own,
                recipe.source,
            ]
        )
    return table(("recipe", "what", "weights", "method", "settings of its own", "source"), rows, numbers=False)


def train_methods() -> str:
    """Methods of training recipes and what --set gives them."""
    rows = []
    for name, method in _parts(METHODS).items():
        base = "packed first" if method.packs else "the float model"
        rows.append([f"`{name}`", method.summary, base, _short_options(method.options_type)])
    return table(("method", "what", "base", "options of --set"), rows, numbers=False)


def train_losses() -> str:
    """What a network in training is told by."""
    rows = [
        [f"`{name}`", _says(LOSSES, name), "yes" if part.taught else "no", _short_options(part)]
        for name, part in _parts(LOSSES).items()
    ]
    return table(("name", "what", "needs a teacher", "options"), rows, numbers=False)


def train_tasks() -> str:
    """What models are trained to do."""
    rows = [
        [f"`{name}`", _markdown(part.summary), part.unit, f"`{part.shown}`", _metrics(part)]
        for name, part in _parts(TASKS).items()
    ]  # fmt: skip
    return table(("task", "of", "the loss is a mean over", "shown first", "metrics"), rows, numbers=False)


def _metrics(task: Task) -> str:
    """What a task's class says of its metrics."""
    found = re.search(r"Metrics: (.*?)\.?\s*$", inspect.cleandoc(type(task).__doc__ or ""), re.S)
    return _markdown(found[1]) if found else ""


def train_settings() -> str:
    """Sizes and rates of the loop."""
    return table(("setting", "kind", "default", "meaning"), _options(TrainSettings), numbers=False)


def coreset_options() -> str:
    """Which part of the examples is trained on."""
    return table(("option", "kind", "default", "meaning"), _options(CoresetOptions), numbers=False)


def coreset_scores() -> str:
    """What examples are chosen by."""
    rows = [
        [f"`{name}`", _markdown(part.summary), "yes" if part.taught else "no"] for name, part in _parts(SCORES).items()
    ]
    return table(("score", "what", "needs a teacher"), rows, numbers=False)


def targets() -> str:
    """All export targets: what each is, what may stand behind its colon, what it loses."""
    rows = []
    for name, part in _parts(export.REGISTRY).items():
        options = "; ".join(f"`{word}`: {_markdown(says)}" for word, says in part.options.items())
        lost = part.loses or "nothing; what it can't hold is refused"
        usual = part.usual
        alone = usual.weights or f":{usual.option}" * bool(usual.option) or load_recipe(f"best-{usual.best}").scheme
        line = alone if isinstance(alone, str) else str(alone.rules[0].weights)
        rows.append([f"`{name}`", _markdown(part.summary), f"`{line}`", options, _markdown(lost)])
    columns = ("target", "what it writes", "made of weights where no scheme is named", "behind a colon", "what is lost")
    return table(columns, rows, numbers=False)


def target_rows() -> str:
    """What every target takes, and who loads that since when."""
    rows = [
        [
            f"`{name}`", f"`{row.form}`", _markdown(row.weights), _markdown(row.inputs), row.runtime,
            f"[{row.since or 'not checked'}]({row.source})", _markdown(row.note),
        ]
        for name, part in _parts(export.REGISTRY).items()
        for row in part.takes
    ]  # fmt: skip
    return table(("target", "in its files", "weights", "inputs", "runtime", "since", "limits"), rows, numbers=False)


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        words, families, format_families, formats, presets, granularities, scale_rules, roundings, packings, rule_keys,
        scheme_keys, scheme_presets, two_sets, recipes, transform_steps, solver_steps, reconstruction_options,
        reconstruction_steps, learned_parts, learned_transforms, train_steps, correction_options, correction_steps,
        targets, target_rows, optimizers, optimizer_presets, train_recipes, train_methods, train_settings,
        train_losses, train_callbacks, train_tasks, coreset_options, coreset_scores,
    )
}  # fmt: skip
