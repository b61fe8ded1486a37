"""Before anything is quantized: a scheme that those who are to load the result can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nybble.checkpoint.marked import COMPRESSED
from nybble.core.errors import SchemeError
from nybble.export import ExportTarget, Facts, get_target
from nybble.export._ct_form import kept_to_form
from nybble.export._modules import without_place
from nybble.models.adapter import adapter_for
from nybble.nn.kinds import targets_of
from nybble.pipelines.targets import AUTO
from nybble.recipe import Recipe, load_recipe
from nybble.recipes import BEST, recipe_for
from nybble.scheme import Scheme
from nybble.transforms import make_transform


def constrain(
    scheme: Scheme,
    targets: Sequence[str],
    model: Any,
    dtype: torch.dtype,
    form: str = AUTO,
    tokenizer: Callable[[], Any] = lambda: None,
) -> Scheme:
    """A scheme whose result every one of some targets holds.

    Args:
        scheme: what is asked for.
        targets: their names, in order.
        model: float, its weights possibly on the meta device.
        dtype: of what will stay in float.
        form: of nybble's own folder; where it is to be compressed-tensors', the scheme is kept to that too.
        tokenizer: reads the model's; a target that writes one asks for it.

    Raises:
        SchemeError: one can't hold it; names the nearest, and options that the target takes. ModelError: one can't hold
            this model in any scheme, or its tokenizer.
    """
    convolutional = adapter_for(model).convolutional
    known = targets_of(model)
    classes = {n: t.kind.class_names(model.get_submodule(t.module), convolutional) for n, t in known.items()}
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
    nowhere = without_place(model, known)
    facts = Facts(
        config=config, dtype=dtype, targets=known, classes=classes, model=model, tokenizer=tokenizer,
        without_place=nowhere,
    )  # fmt: skip
    for name in targets:
        part = get_target(name)
        if part.at_once:
            part.require(check=False)
        with _with_a_way_out(_options(name, part)):
            scheme = part.constrain(scheme, facts)
    if form == COMPRESSED:
        with _with_a_way_out("--form auto, or --form native, writes nybble's own form of it."):
            scheme = kept_to_form(scheme, facts)
    return scheme.of_model(dtype)


def check_steps(recipe: Recipe, targets: Sequence[str], form: str = AUTO) -> None:
    """Refuse steps of a recipe whose result a target, or a form of nybble's own folder, can't hold.

    Raises:
        SchemeError: names the step, the target and a way out.
    """
    for step in recipe.steps:
        if step.kind != "transform" or not make_transform(step.name, step.options).rotates_inputs:
            continue
        if form == COMPRESSED:
            raise SchemeError(
                f"--form {COMPRESSED} can't hold what {step.name} makes, as transformers leaves it out without a word; "
                f"--form auto writes nybble's own form, --target {COMPRESSED} the files for vLLM."
            )
        for name in targets:
            if not get_target(name).rotates:
                raise SchemeError(
                    f"--target {name} can't hold what {step.name} makes: inputs that are rotated while the model runs. "
                    "Leave the step out (rotate and hadamard are folded into weights), or take --target "
                    f"{COMPRESSED}, for vLLM."
                )


@contextmanager
def _with_a_way_out(text: str) -> Iterator[None]:
    try:
        yield
    except SchemeError as error:
        raise SchemeError(f"{error} {text}") from error


def _options(name: str, part: ExportTarget) -> str:
    """Options of ``nybble quantize`` that go with a target."""
    usual = part.usual
    if usual.option:
        return f"--target {name.partition(':')[0]}:{usual.option} takes any weights, with --activations none."
    line = usual.weights or str(load_recipe(recipe_for(BEST, usual.best)).scheme.rules[0].weights)
    return f"--target {name} takes --weights '{line}' --activations none, which it chooses where no scheme is named."
