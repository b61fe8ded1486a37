"""The report: one self-contained HTML page about a quantized model, made from plain dictionaries.

:func:`nybble.report.page.render` makes the page; :mod:`nybble.report.checks` refuses data that it couldn't draw.
"""
