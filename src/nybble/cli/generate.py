"""``nybble generate MODEL "prompt"``: text from a packed (or float) model."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.cli._output import print_json
from nybble.models.named import check_model


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What nybble wrote, or any float model.")],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to continue, or to answer if the model has a chat template.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="For --sample.")] = 0,
    kv: Annotated[
        str | None,
        typer.Option(help="A quantizer line for the KV cache: 'int4 group=32'; 'none' is float. As quantize --kv."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Generate text."""
    check_model(model)
    from nybble.pipelines.request import check_prompt

    check_prompt(prompt, max_new_tokens, device, kv)
    from nybble.pipelines.generate import generate  # torch comes from here on

    text = generate(
        model, prompt, max_new_tokens=max_new_tokens, chat=not raw, sample=sample, seed=seed, device=device, kv=kv
    )
    print_json({"model": model, "prompt": prompt, "text": text}) if json else print(text)
