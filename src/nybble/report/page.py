"""The page: one HTML file with its style, script and data inside; it fetches nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from nybble.core.errors import UsageError
from nybble.report import learning, lines, tables, words

SCRIPTS = ("plot.js", "charts.js", "table.js")


def render(data: dict[str, Any]) -> str:
    """Make the page.

    Args:
        data: ``title``; ``manifest`` (nybble.json, checked); ``config`` (config.json); ``sizes`` (of
            :func:`nybble.checkpoint.account.inspect`); ``evaluation`` (evaluation.json, checked) or None;
            ``times`` (times.json, checked) or None; ``training``, the page about the run that trained it, or empty.

    Returns:
        HTML. Every text in it that came from ``data`` is escaped.

    Raises:
        UsageError: Jinja2 is missing.
    """
    script = joined(*SCRIPTS)
    return fill("page.html.j2", script, context(data))


def joined(*names: str) -> str:
    """Scripts of this folder, one behind the other."""
    return "\n".join(_part(name) for name in names)


def fill(template: str, script: str, values: dict[str, Any]) -> str:
    """A template of this folder as a page; errors as of :func:`render`.

    Args:
        template: the file; it may use ``style``, ``script`` and ``script_hash`` too.
        script: the only one that the page may run.
        values: what it shows.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UsageError("the report needs Jinja2: pip install 'nybble[report]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    page = environment.from_string(_part(template)).render(
        style=Markup(_part("style.css")),  # our own files
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )
    return page.encode("utf-8", "replace").decode()  # JSON may spell half a surrogate pair, which no file can hold


def context(data: dict[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    manifest, evaluation = data["manifest"], data["evaluation"]
    facts = tables.layer_facts(manifest["layers"])
    columns, rows = tables.layer_table(facts)
    shown = {column[0] for column in columns}
    asked = lines.scheme_lines(manifest["recipe"])
    return {
        "name": _text(manifest.get("name")) or data["title"],
        "subtitle": _subtitle(data),
        "recipe": {"name": "", "summary": "", "source": "", **manifest["recipe"]},
        "scheme": _named(manifest["recipe"].get("scheme"), "name"),
        "lines": asked[: lines.MOST],
        "more_lines": max(0, len(asked) - lines.MOST),
        "tiles": tables.tiles(data["sizes"], facts, evaluation),
        "sizes": data["sizes"],
        "total": words.size(data["sizes"]["total"]),
        "bytes": tables.byte_table(data["sizes"]),
        "metrics": tables.metric_table(evaluation or {}),
        "training": data.get("training", ""),
        "evaluated": None if evaluation is None else words.flatten(evaluation.get("data", {})),
        "samples": (evaluation or {}).get("samples", []),
        "model_titles": words.MODELS,
        "chosen": lines.formats_were_chosen(facts, asked),
        "quantizers": [(lines.SIDES[side], *lines.quantizer_table(facts, side)) for side in ("weights", "inputs")],
        "findings": tables.findings(facts),
        "windows": learning.windows_of(manifest["layers"], data.get("times")),
        "unmoved": learning.unmoved(manifest["layers"]),
        "curve_box": f"0 0 {learning.WIDE:g} {learning.HIGH:g}",
        "has_spread": any(row.get("input_picture") for row in facts),
        "columns": columns,
        "left_out": [title for key, title, _ in tables.COLUMNS if key not in shown],
        "rows": rows,
        "drawing": tables.drawing_data(facts),
        "manifest": words.flatten(_decides(manifest)),
        "version": _named(manifest.get("versions"), "nybble"),
    }


def _decides(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without rows of layers and without what describes each tensor."""
    found, form = {key: value for key, value in manifest.items() if key != "layers"}, manifest.get("form")
    if isinstance(form, dict):
        found["form"] = {key: value for key, value in form.items() if key != "quantization"}
    return found


def _part(name: str) -> str:
    return resources.files("nybble.report").joinpath(name).read_text(encoding="utf-8")


def _subtitle(data: dict[str, Any]) -> str:
    """Folder, unless that is the page's name; architecture and size, as far as config.json has the usual words."""
    config, title = data["config"], str(data["title"])
    found = [f"in {title}"] if _text(data["manifest"].get("name")) not in ("", title) else []
    names = config.get("architectures")
    found += [str(names[0])] if isinstance(names, list) and names else []
    for key, what in (("num_hidden_layers", "blocks"), ("hidden_size", "channels"), ("vocab_size", "tokens")):
        if isinstance(config.get(key), int):
            found.append(f"{config[key]:,} {what}")
    return " · ".join(found)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _named(value: Any, key: str) -> str:
    return str(value.get(key, "")) if isinstance(value, dict) else ""
