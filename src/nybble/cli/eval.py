"""``nybble eval MODEL --data SRC``: metrics of a model, float or quantized."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.cli._output import print_json, print_table


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What nybble wrote, or any float model.")],
    data: Annotated[
        str,
        typer.Option(
            help="A text file, JSONL, hub dataset id, or builtin; an IDX file, .npy, .npz or a folder of pictures."
        ),
    ] = "builtin",
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: ppl, nll, kl, agreement; cosine (encoders); top1 (images). Left out: the usual."
        ),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The float model, for kl and agreement.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a window; windows do not overlap.")] = 512,
    samples: Annotated[int | None, typer.Option(help="At most so many windows, spread evenly; default all.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Evaluate MODEL on text."""
    from nybble.core.progress import Bars
    from nybble.pipelines.evaluate import run_eval

    names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    result = run_eval({"model": model}, data, names, reference, seq_len, samples, device, progress=Bars())
    found, manifest = result["models"], result["data"]
    if json:
        count = manifest.get("predictions", manifest.get("tokens"))
        print_json({"metrics": found["model"], "tokens": count, "data": manifest, "model": model})
        return
    print_table(
        f"{model} on {data}", ("metric", "value"), [[name, f"{value:.5g}"] for name, value in found["model"].items()]
    )
    what = f"{manifest['predictions']} predictions" if "predictions" in manifest else f"{manifest['samples']} samples"
    digest = manifest.get("source_sha256", manifest.get("pixels_sha256"))
    print(f"{what}; data sha256 {str(digest)[:16]}")
