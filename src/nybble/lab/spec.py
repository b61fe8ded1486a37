"""A run before it is run: frozen, and known by the hash of what decides its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nybble.core.errors import FileError
from nybble.lab.contents import fingerprint
from nybble.lab.kinds import REGISTRY, RunKind


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What is run.

    Attributes:
        kind: of run (:mod:`nybble.lab.kinds`). version: of what that kind does.
        options: those that aren't at the kind's defaults, as JSON has them; so a kind may get new options, and runs
            that don't use them stay the same runs.
        contents: option -> hash of the file or folder that it names.
    """

    kind: str
    version: int
    options: Mapping[str, Any]
    contents: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """SHA-256, in hexadecimal, of what decides the result: of files their contents count, not their places."""
        options = {name: self.contents.get(name, value) for name, value in self.options.items()}
        return hashlib.sha256(_text({"kind": self.kind, "version": self.version, "options": options})).hexdigest()

    def make(self) -> RunKind:
        """The run itself.

        Raises:
            UsageError: no such kind. SchemeError: options that it doesn't have.
        """
        made: RunKind = REGISTRY.make(self.kind, self.options)
        return made

    def check_contents(self) -> None:
        """Raise FileError where a file isn't what it was when the run was described."""
        for name, known in self.contents.items():
            if fingerprint(str(self.options[name])) != known:
                raise FileError(
                    f"{name} {self.options[name]} is missing, or has changed since the run was queued; "
                    "put it back, or run the sweep anew, which makes new runs of what is there now."
                )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; the key isn't in it."""
        return {
            "kind": self.kind, "version": self.version, "options": dict(self.options), "contents": dict(self.contents),
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RunSpec:
        """Inverse of :meth:`to_dict`."""
        return RunSpec(**data)


def describe(made: RunKind, kind: str, read: Callable[[str], str | None] = fingerprint) -> RunSpec:
    """The spec of a run.

    Args:
        made: the run.
        kind: its kind's name.
        read: gives the hash of what a path holds, None of what is no path.
    """
    options = {}
    for option in dataclasses.fields(made):
        value = getattr(made, option.name)
        if value != option.default:
            options[option.name] = list(value) if isinstance(value, tuple) else value
    contents = {}
    for name in made.FILES:
        found = read(str(options[name])) if isinstance(options.get(name), str) else None
        if found is not None:
            contents[name] = found
    return RunSpec(kind=kind, version=made.VERSION, options=options, contents=contents)


def _text(value: Any) -> bytes:
    """One spelling of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
