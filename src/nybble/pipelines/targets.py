"""What ``--target`` and ``--form`` of ``nybble quantize`` mean; without torch."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.checkpoint.marked import COMPRESSED, NATIVE
from nybble.core.errors import UsageError, did_you_mean
from nybble.export import REGISTRY, is_target
from nybble.recipes import targets

AUTO = "auto"
FORMS = (AUTO, COMPRESSED, NATIVE)
"""Of the files: compressed-tensors', which others load without nybble; nybble's own, which holds everything; or the
first where it says all of the result."""


def check_form_name(form: str) -> None:
    """Raise UsageError unless there is such a form."""
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}.{did_you_mean(str(form), FORMS)}")


def split_targets(target: str | Sequence[str] | None) -> tuple[str | None, list[str]]:
    """What ``best`` is to come to, and who is to load the result: names of the two never meet.

    Args:
        target: one name, several, or none: of a best recipe's target (``w4a16``), of export targets
            (``compressed-tensors``, ``dense:float16``).

    Raises:
        UsageError: a name of neither, with the closest; two of the first kind.

    >>> split_targets(["W4A16", "dense:float16"])
    ('W4A16', ['dense:float16'])
    """
    given = [target] if isinstance(target, str) else list(target or ())
    files = [name for name in given if is_target(name)]
    aims = [name for name in given if name not in files]
    for name in aims:
        if name.lower() not in targets():
            known = [*targets(), *REGISTRY.names()]
            raise UsageError(f"unknown target {name!r}.{did_you_mean(name.lower(), known)}")
    if len(aims) > 1:
        raise UsageError(f"two targets for the recipe best: {', '.join(aims)}. Keep one.")
    return (aims[0] if aims else None), files
