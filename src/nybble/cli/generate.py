"""``nybble generate MODEL "prompt"``: text from a packed (or float) model; with --dataset a set of its own texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli._options import grouped
from nybble.cli._output import is_silent, print_json
from nybble.core.errors import UsageError
from nybble.core.files import check_new_file
from nybble.models.named import check_model


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Of --dataset: :class:`nybble.training.generated.Generation`."""

    count: Annotated[int, typer.Option(help="For --dataset: texts.")] = 1024
    length: Annotated[int, typer.Option(help="For --dataset: most tokens of a text.")] = 256
    strategy: Annotated[
        str,
        typer.Option(
            help="For --dataset: hybrid (the first 3 to 5 tokens the likeliest ones, the rest drawn), greedy or sample."
        ),
    ] = "hybrid"
    temperature: Annotated[float, typer.Option(help="For --dataset: of what is drawn.")] = 1.0
    top_k: Annotated[int, typer.Option(help="For --dataset: of how many tokens one is drawn.")] = 50
    batch: Annotated[int, typer.Option(help="For --dataset: texts at a time.")] = 64
    resume: Annotated[bool, typer.Option("--resume", help="For --dataset: go on with what a killed run left.")] = False


DATASET = DatasetOptions()


@grouped
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What nybble wrote, or any float model.")],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What to continue, or to answer if the model has a chat template."),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Instead of an answer: a file to write, with texts of the model's own, to train on."),
    ] = None,
    texts: DatasetOptions = DATASET,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    kv: Annotated[
        str | None,
        typer.Option(help="A quantizer line for the KV cache: 'int4 group=32'; 'none' is float. As quantize --kv."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Generate text."""
    check_model(model)
    if (prompt is None) == (dataset is None):
        raise UsageError("give a PROMPT to go on from, or --dataset FILE for a set of the model's own texts.")
    if dataset is not None:
        given = {"--max-new-tokens": max_new_tokens != 64, "--raw": raw, "--sample": sample, "--kv": kv is not None}
        for name in (name for name, is_given in given.items() if is_given):
            raise UsageError(f"{name} is for an answer to a PROMPT; texts of --dataset have options of their own.")
        _dataset(model, dataset, texts, seed, device, json)
        return
    if texts != DATASET:
        other = next(name for name, value in vars(texts).items() if value != getattr(DATASET, name))
        raise UsageError(f"--{other.replace('_', '-')} is for --dataset FILE, texts of the model's own; leave it out.")
    assert prompt is not None
    from nybble.pipelines.request import check_prompt

    check_prompt(prompt, max_new_tokens, device, kv)
    from nybble.pipelines.generate import generate  # torch comes from here on

    text = generate(
        model, prompt, max_new_tokens=max_new_tokens, chat=not raw, sample=sample, seed=seed, device=device, kv=kv
    )
    print_json({"model": model, "prompt": prompt, "text": text}) if json else print(text)


def _dataset(model: str, out: Path, texts: DatasetOptions, seed: int, device: str, json: bool) -> None:
    check_new_file(out)
    from nybble.core import ranks
    from nybble.core.device import check_device
    from nybble.core.progress import Bars
    from nybble.pipelines.dataset import generate_dataset  # torch comes from here on
    from nybble.training.generated import Generation

    check_device(device)
    options: dict[str, Any] = {**vars(texts)}
    resume = options.pop("resume")
    with ranks.started(device):  # which makes a GPU of its own "cuda"
        found = generate_dataset(
            model, out, Generation(**options, seed=seed), device=device, resume=resume, progress=Bars()
        )  # fmt: skip
    if is_silent():
        return
    print_json(found) if json else print(f"{found['out']}: {found['texts']:,} texts, {found['tokens']:,} tokens")


def interrupted(dataset: Path | None = None, **_: object) -> str:
    """What Ctrl-C left behind."""
    if dataset is None or not dataset.with_name(f"{dataset.name}.begun").exists():
        return "interrupted; nothing was written."
    return f"interrupted. What was done is kept beside {dataset}; repeat the command with --resume to go on."
