"""``nybble eval MODEL --data SRC``: metrics of a model, float or quantized; or in tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli._options import grouped
from nybble.cli._output import note, print_json, print_table
from nybble.core.device import check_device
from nybble.core.errors import UsageError
from nybble.core.options import at_least_one
from nybble.data.text import check_source
from nybble.models.named import check_model

COMPARING = frozenset({"agreement", "cosine", "kl", "noise_mse", "noise_sqnr"})
"""Nybble's own metrics that are none without a float model; known here, so that saying so takes no torch."""
SEQ_LEN = 512


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Of tasks, in place of data and metrics."""

    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated tasks of lm-evaluation-harness (pip install 'nybble\\[lm-eval]'), in place of --data."
        ),
    ] = None
    inverse_scaling: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated tasks in which larger models do worse (neqa, redefine ...; all: what can be "
            "made here), or .jsonl and .csv files, in place of --data."
        ),
    ] = None
    task_dir: Annotated[
        Path | None,
        typer.Option(
            help="A folder with tasks of your own: YAML files, and the data and Python that these name; of "
            "--inverse-scaling, with the prize's files."
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(help="Of tasks: prompts at a time; left out, 8, or 1 where a batch would share a scale."),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Of tasks: only the first so many questions of each.")] = None
    num_fewshot: Annotated[int | None, typer.Option(help="Of tasks: solved examples in front of a question.")] = None
    chat: Annotated[bool, typer.Option("--chat", help="Of tasks: put prompts into the chat template.")] = False

    def given(self) -> list[str]:
        """The options of tasks that were given, as they are typed."""
        names = ("task_dir", "batch_size", "limit", "num_fewshot", "chat") if self.inverse_scaling is None else _THEIRS
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, False)]


_THEIRS = ("num_fewshot", "chat")
"""Options of lm-evaluation-harness's tasks that those of inverse scaling lack: their examples are in the prompts."""
TASKS = TaskOptions()


@grouped
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What nybble wrote, or any float model.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="What the model reads: a text file, JSONL, hub dataset id or builtin (the default); images; a "
            "plug-in's own."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, say ppl,kl; a name that doesn't fit the model is answered with those that do. "
            "Left out: the usual."
        ),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The float model, for metrics that compare with it.")] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens a window, 512; windows do not overlap. Of tasks: at most, else as the model says."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="At most so many windows, sentences or images, spread evenly; default all.")
    ] = None,
    integer: Annotated[
        bool,
        typer.Option(
            "--integer",
            help="Run in integers alone, to the logits: a CNN (recipe hawq-v3) or a transformer (recipe bct).",
        ),
    ] = False,
    kv: Annotated[
        str | None,
        typer.Option(help="A quantizer line for the KV cache: 'int4 group=32'; 'none' is float. As quantize --kv."),
    ] = None,
    task: TaskOptions = TASKS,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Evaluate MODEL on held-out text, on images if it reads those, or in tasks by name."""
    for spec in (model,) if reference is None else (model, reference):
        check_model(spec)
    check_device(device)
    at_least_one(seq_len=seq_len, samples=samples, batch_size=task.batch_size, limit=task.limit)
    if task.tasks is not None or task.inverse_scaling is not None:
        if task.tasks is not None and task.inverse_scaling is not None:
            raise UsageError("--tasks and --inverse-scaling ask apart; give one of them.")
        theirs: dict[str, Any] = {"--data": data, "--metrics": metrics, "--samples": samples}
        theirs |= {"--integer": integer or None, "--kv": kv}
        if wrong := [name for name, value in theirs.items() if value is not None]:
            raise UsageError(
                f"tasks bring data and metrics of their own; leave out {wrong[0]} (--limit says how much)."
            )
        models = {"model": model} | ({} if reference is None else {"reference": reference})
        if task.inverse_scaling is None:
            _tasks(models, task, seq_len, device, json)
        else:
            _inverse_scaling(models, task, seq_len, device, json)
        return
    if wrong := task.given():
        raise UsageError(f"{wrong[0]} is of tasks; name some (--tasks NAME[,NAME]), or leave it out.")
    names = None if metrics is None else _names(metrics)
    _on_data(
        model,
        "builtin" if data is None else data,
        names,
        reference,
        seq_len or SEQ_LEN,
        samples,
        integer,
        kv,
        device,
        json,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _on_data(
    model: str,
    data: str,
    names: list[str] | None,
    reference: str | None,
    seq_len: int,
    samples: int | None,
    integer: bool,
    kv: str | None,
    device: str,
    json: bool,
) -> None:
    """Metrics on held-out data, in a table or as JSON."""
    check_source(data)
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
        integer=integer,
        kv=kv,
        device=device,
        progress=Bars(),
    )
    found, manifest = result["models"], result["data"]
    said: dict[str, Any] = {"integer": True} if integer else {}
    said |= {} if kv is None else {"kv": kv}
    if json:
        count = manifest.get("predictions", manifest.get("tokens"))
        print_json({"metrics": found["model"], "tokens": count, "data": manifest, "model": model, **said})
        return
    print_table(
        f"{model} on {data}{', in integers' if integer else ''}",
        ("metric", "value"),
        [[name, f"{value:.5g}"] for name, value in found["model"].items()],
    )
    what = f"{manifest['predictions']} predictions" if "predictions" in manifest else f"{manifest['samples']} samples"
    digest = next((value for name, value in manifest.items() if name.endswith("sha256")), "not stated")
    what += "" if kv is None else f", keys and values cached in {kv}"
    print(f"{what}; data sha256 {str(digest)[:16]}")


def _tasks(models: dict[str, str], task: TaskOptions, seq_len: int | None, device: str, json: bool) -> None:
    """Scores of the model, and of the reference where there is one, in a table or as JSON."""
    from nybble.pipelines.tasks import run_tasks

    result = run_tasks(
        models,
        _names(str(task.tasks)),
        task.task_dir,
        batch_size=task.batch_size,
        limit=task.limit,
        num_fewshot=task.num_fewshot,
        chat=task.chat,
        seq_len=seq_len,
        device=device,
    )
    found, manifest = result["models"], result["data"]
    for text in result["notes"].values():
        note(text)
    if json:
        said: dict[str, Any] = {"metrics": found["model"], "data": manifest, "model": models["model"]}
        beside = {"reference": found["reference"]} if "reference" in found else {}
        print_json({**said, **beside, "notes": result["notes"]})
        return
    rows = [[name, *(_with_error(numbers, name) for numbers in found.values())] for name in found["model"]]
    print_table(f"{models['model']} in {manifest['source']}", ("metric", *found), [r for r in rows if r[1]])
    for name, facts in manifest["tasks"].items():
        print(f"{name}: {facts['samples']} questions, version {facts['version']}; sha256 {facts['sha256'][:16]}")


def _inverse_scaling(models: dict[str, str], task: TaskOptions, seq_len: int | None, device: str, json: bool) -> None:
    """Loss, accuracy and coverage of each task, beside the reference's where there is one."""
    if wrong := task.given() or (["--seq-len"] if seq_len is not None else []):
        raise UsageError(f"{wrong[0]} isn't of --inverse-scaling; leave it out.")
    from nybble.core.progress import Bars
    from nybble.eval.inverse_scaling.tasks import check_task, made_here
    from nybble.pipelines.inverse_scaling import run_inverse_scaling

    names = made_here() if str(task.inverse_scaling).strip() == "all" else _names(str(task.inverse_scaling))
    if not names:
        raise UsageError("no task is named; say --inverse-scaling NAME[,NAME], or all.")
    for name in names:
        check_task(name, task.task_dir)
    result = run_inverse_scaling(
        models,
        names,
        folder=task.task_dir,
        reference="reference" if "reference" in models else None,
        limit=task.limit,
        batch=task.batch_size,
        device=device,
        progress=Bars(),
    )
    if json:
        print_json({**result, "model": models["model"]})
        return
    for name, found in result["tasks"].items():
        told = {who: values["metrics"] for who, values in found["models"].items()}
        keys = [key for key in told["model"] if not key.endswith(("_se", "_chance"))]
        rows = [[key, *(_of_chance(numbers, key) for numbers in told.values())] for key in keys]
        print_table(f"{name}, {found['questions']} rows", ("metric", *told), rows)
        print(f"{name}: {found['source']}, sha256 {found['sha256'][:16]}")
        if changed := found["models"]["model"].get("paired"):
            print(", ".join(f"{key} {value:.4g}" for key, value in changed.items()))
        if found["models"]["model"]["collapsed"]:
            note(f"{name}: the model gives the answers on offer less than 1 % of its probability: it is broken.")
        if found["expected"] and not found["lookalike"] and found["questions"] not in found["expected"]:
            note(f"{name}: {found['questions']} rows; published were {' or '.join(map(str, found['expected']))}.")


def _of_chance(numbers: dict[str, float], name: str) -> str:
    """A value with its standard error, and what chance would give."""
    error, chance = numbers.get(f"{name}_se"), numbers.get(f"{name}_chance")
    text = f"{numbers[name]:.5g}" + ("" if error is None else f" ± {error:.2g}")
    return text if chance is None else f"{text} (chance {chance:.3g})"


def _with_error(numbers: dict[str, float], name: str) -> str:
    """A value with its standard error; empty for the standard error itself."""
    metric, comma, rule = name.partition(",")
    if metric.endswith("_stderr"):
        return ""
    error = numbers.get(f"{metric}_stderr{comma}{rule}")
    return f"{numbers[name]:.5g}" + ("" if error is None else f" ± {error:.2g}")
