"""``nybble eval MODEL --data SRC``: metrics of a model, float or quantized."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.cli._output import print_json, print_table
from nybble.core.device import check_device
from nybble.core.errors import UsageError
from nybble.core.options import at_least_one
from nybble.data.text import check_source
from nybble.models.named import check_model

COMPARING = frozenset({"agreement", "cosine", "kl"})
"""Nybble's own metrics that are none without a float model; known here, so that saying so takes no torch."""


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What nybble wrote, or any float model.")],
    data: Annotated[
        str,
        typer.Option(
            help="What the model reads: a text file, JSONL, hub dataset id or builtin; images; a plug-in's own."
        ),
    ] = "builtin",
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, say ppl,kl; a name that doesn't fit the model is answered with those that do. "
            "Left out: the usual."
        ),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The float model, for metrics that compare with it.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a window; windows do not overlap.")] = 512,
    samples: Annotated[
        int | None, typer.Option(help="At most so many windows, sentences or images, spread evenly; default all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Evaluate MODEL on held-out text, or on images if it reads those."""
    for spec in (model,) if reference is None else (model, reference):
        check_model(spec)
    check_source(data)
    check_device(device)
    at_least_one(seq_len=seq_len, samples=samples)
    names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    if reference is None and (needy := COMPARING.intersection(names or ())):
        raise UsageError(f"metric {min(needy)!r} compares with the float model; give it (--reference MODEL).")
    from nybble.core.progress import Bars  # torch comes from here on
    from nybble.pipelines.evaluate import run_eval

    result = run_eval(
        {"model": model},
        data,
        metrics=names,
        reference=reference,
        seq_len=seq_len,
        samples=samples,
        device=device,
        progress=Bars(),
    )
    found, manifest = result["models"], result["data"]
    if json:
        count = manifest.get("predictions", manifest.get("tokens"))
        print_json({"metrics": found["model"], "tokens": count, "data": manifest, "model": model})
        return
    print_table(
        f"{model} on {data}", ("metric", "value"), [[name, f"{value:.5g}"] for name, value in found["model"].items()]
    )
    what = f"{manifest['predictions']} predictions" if "predictions" in manifest else f"{manifest['samples']} samples"
    digest = next((value for name, value in manifest.items() if name.endswith("sha256")), "not stated")
    print(f"{what}; data sha256 {str(digest)[:16]}")
