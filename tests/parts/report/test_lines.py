"""What the report calls a scheme's lines."""

from __future__ import annotations

from nybble.report.lines import scheme_lines


def test_of_presets_with_one_line_the_first_names_it() -> None:
    """``mxint8`` and ``bfp16`` are one line under two names."""
    recipe = {"scheme": {"rules": [{"targets": ["Linear"], "weights": "mxint8"}]}}
    ((_, line, words),) = scheme_lines(recipe)
    assert "mxint8" in words or "mxint8" in line
    assert "bfp16" not in words + line
