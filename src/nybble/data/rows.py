"""One record of a data set as text: its ``text``, or its chat ``messages`` through the tokenizer's chat template.

A record may say what an encoder-decoder is to make of it: the first that it has of ``target``, ``summary`` and
``translation``, beside ``text`` or ``source``. Models of another kind read the text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nybble.core.errors import DataError
from nybble.data.text import Record, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TARGETS = ("target", "summary", "translation")


def row_record(row: object, place: str, tokenizer: PreTrainedTokenizerBase | None) -> Record:
    """Return the document that a record holds, with its target.

    Args:
        row: a mapping with ``text`` (a string), with ``messages`` (``[{"role": ..., "content": ...}, ...]``), or with
            ``source`` and a target; or the string itself.
        place: file and line, for the error.
        tokenizer: needed for ``messages``; its chat template renders them, without a generation prompt.

    Raises:
        DataError: none of these fields, or of the wrong type; no chat template; a template that refuses the messages.
    """
    if isinstance(row, str):
        return Record(check_text(row, place))
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is a {type(row).__name__}, not an object with 'text' or 'messages'.")
    targets = [key for key in TARGETS if isinstance(row.get(key), str) and row[key].strip()]
    target = check_text(row[targets[0]], place) if targets else ""
    if isinstance(row.get("text"), str):
        return Record(check_text(str(row["text"]), place), target)
    if isinstance(row.get("source"), str) and targets:
        return Record(check_text(row["source"], place), target)
    if isinstance(row.get("messages"), list):
        return Record(render(row["messages"], place, tokenizer))
    if isinstance(row.get("translation"), Mapping):
        languages = " and ".join(map(str, row["translation"]))
        raise DataError(
            f"{place}: 'translation' holds {languages}, and not which is translated. Write the record as 'source' and "
            "'target'."
        )
    if wrong := [key for key in ("text", "messages") if key in row]:
        needed = "a string" if wrong[0] == "text" else "a list"
        raise DataError(f"{place}: {wrong[0]!r} is a {type(row[wrong[0]]).__name__}; it must be {needed}.")
    fields = ", ".join(map(str, row)) or "none"
    raise DataError(
        f"{place} has neither 'text' nor 'messages'; its fields: {fields}. For an encoder-decoder, 'source' and "
        "'target' will do, too."
    )


def render(messages: list[Any], place: str, tokenizer: PreTrainedTokenizerBase | None, *, answer: bool = False) -> str:
    """Chat messages as the tokenizer's template writes them; ``answer``: up to where the assistant's answer begins.

    Raises:
        DataError: no template, malformed messages, or a template that refuses them.
    """
    if tokenizer is None or not tokenizer.chat_template:
        lack = "no tokenizer was given" if tokenizer is None else "this model's tokenizer has no chat template"
        raise DataError(f"{place} holds chat messages, and {lack}. Use a chat model, or records with 'text'.")
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise DataError(f"{place}: each of 'messages' must be an object with 'role' and 'content'.")
    try:
        return check_text(
            str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)), place
        )
    except DataError:
        raise
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise DataError(f"{place}: the chat template refuses these messages: {error}") from error
