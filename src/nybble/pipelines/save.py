"""A model in memory as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.checkpoint import save as checkpoint
from nybble.pipelines.form import writer
from nybble.pipelines.targets import AUTO, check_form_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    manifest: dict[str, Any] | None = None,
    *,
    form: str = AUTO,
) -> Path:
    """Write a model that was quantized in memory to a folder, as ``nybble quantize`` would.

    Args:
        model: from :func:`nybble.quantize`, or after training from ``convert``.
        out: must not exist.
        tokenizer: to stand beside it; without one, text can't be made or judged with the folder.
        manifest: what nybble.json says; None takes what the model remembers of its quantization, if it does.
        form: ``compressed-tensors``, which loads without nybble; ``native``; or ``auto``: the first where it says all
            of the model.

    Raises:
        UsageError: nothing in it is quantized, its cache neither; no such form. FileError: the folder exists or can't
            be written, or can't be in the form that is asked for.
    """
    check_form_name(form)
    return checkpoint.save(model, out, tokenizer, manifest, writer(form, lambda line: None))
