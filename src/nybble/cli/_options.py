"""Groups of options as dataclasses: a command says ``run: RunOptions`` and Typer sees every field as an option."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable
from functools import wraps
from typing import Any


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose dataclass parameters are spread out into their fields, in place, for Typer.

    Args:
        command: its parameters annotated, those that are dataclasses with a default for every field. A dataclass's
            ``PANEL`` heads its options in the help.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        fields = typing.get_type_hints(groups[name], include_extras=True)
        panel = getattr(groups[name], "PANEL", None)
        for field in dataclasses.fields(groups[name]):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            hint = _in_panel(fields[field.name], panel)
            parameters.append(inspect.Parameter(field.name, kind, default=field.default, annotation=hint))

    @wraps(command)
    def spread(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread


def _in_panel(hint: Any, panel: str | None) -> Any:
    """An option's annotation with a heading of its own."""
    kind, option = typing.get_args(hint)
    option = copy.copy(option)
    option.rich_help_panel = panel
    return typing.Annotated[kind, option]
