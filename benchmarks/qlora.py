"""QLoRA beside 16-bit LoRA: the same adapters, data, order and seeds over a base in 16 bits and in several of 4.

    python benchmarks/instructions.py build/instructions
    python benchmarks/qlora.py --device cuda --seconds 540 --out benchmarks/results/qlora.json

SmolLM2-135M (``demo:smollm2``, or its file with ``--smollm2``) learns to answer as Python's reference and Debian's
packages do; a tenth of the pages and sources is held out, and its loss, in nats a target token, is what is compared.
LoRA is on all linear layers but the head, and everything but the base is the same bit for bit: each adapter begins with
the same numbers and meets the same examples. ``NF4 + DQ by GPTQ`` has codes of that format which GPTQ chose, calibrated
on what is trained on, too. ``PEFT + bitsandbytes`` is the peer's base, layers and kernels under the same loop; it is
left out, by name, where they can't be imported.

The model's weights lie on a grid of 16 levels in groups of 32 (its file is Q4_1), so integers with a zero point in
groups of 32 would lose nothing; no such line is among these.

Runs go seed by seed, each variant once, until the next would not fit into ``--seconds``; a file from the same request
is gone on with. A ratio is of the means over the seeds that both variants have; ``by_seed`` shows how far they scatter.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import nybble
from nybble.core.errors import ModelError
from nybble.core.files import atomic_write_json
from nybble.core.progress import Silent
from nybble.core.seeds import derive_seed
from nybble.core.versions import versions
from nybble.data.instructions import Example, Examples, load_examples
from nybble.models.build.config_file import read_json
from nybble.nn.linear import QuantLinear
from nybble.nn.swap import set_module
from nybble.pipelines.request import build_recipe
from nybble.training.adapters import with_adapter
from nybble.training.loop import train
from nybble.training.measures import held_out
from nybble.training.settings import TrainSettings

FLOAT, OURS, PEER = "16-bit LoRA", "NF4 + DQ", "PEFT + bitsandbytes NF4 + DQ"
LINES = {
    OURS: "nf4-bnb-dq",
    "NF4": "nf4-bnb",
    "E2M1": "float4_e2m1fn flat=64",
    "INT4": "int4 flat=64",
    "NVFP4": "nvfp4",
}
TWO = "NF4 + DQ, two projections"
GPTQ = "NF4 + DQ by GPTQ"
VARIANTS = (FLOAT, OURS, PEER, GPTQ, "NF4", "E2M1", "INT4", "NVFP4", TWO)
CALIBRATION = {"samples": 128, "seq_len": 384, "batch": 8}
BAR = 1.005
"""Held-out loss over that of 16-bit LoRA, of NF4 + DQ."""
JUDGED = (OURS, GPTQ, PEER)
PEERS = ("peft", "accelerate", "bitsandbytes")
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- models
def line_of(variant: str) -> str | None:
    """The quantizer line of the base; None where nybble packs nothing."""
    return "nf4-dq" if variant == GPTQ else LINES.get(OURS if variant == TWO else variant)


def base(variant: str, options: argparse.Namespace, rows: Sequence[Example]) -> tuple[nn.Module, float]:
    """The frozen model on the device, and bits of a weight that is adapted, constants included.

    GPTQ is calibrated on examples that are trained on, too.
    """
    model, tokenizer = nybble.load(options.smollm2 or options.model, dtype=options.dtype)
    line = line_of(variant)
    if variant == GPTQ:
        texts = [tokenizer.decode(row["input_ids"]) for row in rows[:: max(1, len(rows) // 1500)]]
        nybble.quantize(
            model.to(options.device), build_recipe("gptq", weights=line), texts, tokenizer=tokenizer,
            settings=CALIBRATION,
        )  # fmt: skip
    elif line is not None:
        nybble.quantize(model, build_recipe("rtn", weights=line))
    if line is not None:
        layers: list[Any] = [m for m in model.modules() if isinstance(m, QuantLinear)]
        bits = 8 * sum(m.weight.qtensor().nbytes() for m in layers) / sum(m.weight.shape.numel() for m in layers)
        return model.to(options.device).requires_grad_(False), bits
    if variant == PEER:
        bits = with_bitsandbytes(model, options.device)
        return model.to(options.device).requires_grad_(False), bits
    return model.to(options.device).requires_grad_(False), 8.0 * getattr(torch, options.dtype).itemsize


@torch.no_grad()
def with_bitsandbytes(model: Any, device: str) -> float:
    """Their layers in place of all linear ones but the head, as transformers' loader puts them; bits of a weight."""
    from bitsandbytes import nn as theirs

    head, kept, count = model.get_output_embeddings(), 0, 0
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]:
        weight: Tensor = layer.weight.detach()
        made = theirs.Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=weight.dtype,
            compress_statistics=True, quant_type="nf4",
        )  # fmt: skip
        made.weight = theirs.Params4bit(weight.contiguous(), False, quant_type="nf4", compress_statistics=True)
        made.bias = layer.bias
        made = made.to(device)
        set_module(model, name, made)
        state = made.weight.quant_state
        parts = (made.weight.data, state.absmax, state.state2.absmax, state.offset)
        kept, count = kept + sum(t.numel() * t.element_size() for t in parts), count + weight.numel()
    model.is_loaded_in_4bit = True  # what PEFT asks before it looks for their layers
    return 8 * kept / count


def adapted(model: nn.Module, variant: str, options: argparse.Namespace, seed: int) -> nn.Module:
    """With adapters that begin with the same numbers, whatever they stand beside."""
    targets: Any = ["q_proj", "v_proj"] if variant == TWO else "all-linear"
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(derive_seed(seed, "qlora", "A"))
    found = with_adapter(model, config, "the benchmark")
    for name, parameter in sorted(found.named_parameters()):
        if parameter.requires_grad and ".lora_A." in name:  # not in whatever order PEFT met the layers
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            bound = parameter.shape[1] ** -0.5
            drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
            parameter.data.copy_(drawn)
    return found


# --------------------------------------------------------------------------------------------------------------- runs
def run(
    variant: str, seed: int, options: argparse.Namespace, rows: Sequence[Example], held: Sequence[Example],
    before: float | None,
) -> Row:  # fmt: skip
    """One variant with one seed; ``before`` is the loss of the base, where an earlier seed has it."""
    settings = replace(settings_of(options), seed=seed)
    model, bits = base(variant, options, rows)
    if before is None:
        before = held_out(model, held, 16, Silent())["nll"]
        if variant == PEER:  # on CPUs its layers can't be trained once they were asked
            model, bits = base(variant, options, rows)
    model = adapted(model, variant, options, seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        found = train(model, rows, settings, Path(folder), Silent())
    seconds = time.perf_counter() - began
    after = held_out(model, held, 16, Silent())["nll"]
    losses = [loss for _, loss in found.curve]
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "bits": bits, "before": before, "after": after, "trainable": trainable, "first_update": losses[0],
        "last_tenth": statistics.fmean(tail), "seconds_an_update": seconds / found.steps, "memory": found.memory,
    }  # fmt: skip


def settings_of(options: argparse.Namespace) -> TrainSettings:
    """The same for all."""
    return TrainSettings(
        steps=options.steps, batch=options.batch, accumulate=options.accumulate, seq_len=options.seq_len, lr=options.lr,
        optimizer=options.optimizer, checkpointing=options.checkpointing, dtype=options.dtype, device=options.device,
        save_every=1_000_000_000,
    )  # fmt: skip


def missing(variant: str) -> str | None:
    """Why a variant can't run here."""
    if variant != PEER:
        return None
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            import bitsandbytes  # noqa: F401
    except Exception as error:  # a missing library of its own is an OSError, a torch that is too old an AttributeError
        return f"bitsandbytes can't be imported: {' '.join(str(error).split())[:200]}"
    return None


# ------------------------------------------------------------------------------------------------------------ results
def summary(runs: dict[str, dict[str, Row]]) -> list[Row]:
    """A row a variant: means, and ratios to 16-bit LoRA of the seeds that both have."""
    rows = []
    for variant in (name for name in VARIANTS if runs.get(name)):
        own, beside = runs[variant], runs.get(FLOAT, {})
        common = [seed for seed in own if seed in beside]
        ratios = [own[seed]["after"] / beside[seed]["after"] for seed in common]
        rows.append({
            "variant": variant, "line": line_of(variant), "seeds": len(own),
            "bits": next(iter(own.values()))["bits"], "before": statistics.fmean(r["before"] for r in own.values()),
            "after": statistics.fmean(r["after"] for r in own.values()),
            "ratio": statistics.fmean(own[s]["after"] for s in common) / statistics.fmean(
                beside[s]["after"] for s in common) if common else None,
            "by_seed": ratios, "seconds_an_update": statistics.median(r["seconds_an_update"] for r in own.values()),
        })  # fmt: skip
    return rows


def shown(rows: Sequence[Row]) -> None:
    print(f"{'variant':30s} {'bits':>7s} {'before':>8s} {'after':>8s} {'ratio':>8s} {'s/update':>9s}  by seed")
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.4f}"
        scatter = " ".join(f"{found:.4f}" for found in row["by_seed"])
        print(
            f"{row['variant']:30s} {row['bits']:7.3f} {row['before']:8.4f} {row['after']:8.4f} {ratio:>8s} "
            f"{row['seconds_an_update']:9.3f}  {scatter}"
        )


def with_peers() -> dict[str, str]:
    found = versions()
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--smollm2", help="the model's GGUF file, where the package that carries it isn't installed")
    parser.add_argument("--data", type=Path, default=Path("build/instructions"), help="of instructions.py")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", help="default bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no run that would end later")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=440)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=384)
    parser.add_argument("--held", type=int, default=800, help="examples that are held out")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--optimizer", default="torch.AdamW fused=true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def request_of(options: argparse.Namespace, data: Examples, held: Examples, judged: int) -> Row:
    """All that must be the same for a file to be gone on with."""
    name = "SmolLM2-135M-Instruct Q4_1" if options.smollm2 or options.model == "demo:smollm2" else options.model
    lora = {key: getattr(options, key) for key in ("rank", "alpha", "dropout")}
    settings = {k: v for k, v in asdict(settings_of(options)).items() if k not in ("seed", "save_every", "resume")}
    own = {key: value | {"source": Path(value["source"]).name} for key, value in
           (("data", data.manifest()), ("held", held.manifest()))}  # fmt: skip
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    return {"model": name, **own, "judged": judged, "lora": lora, "settings": settings, "device": device}


def main() -> None:
    """Train, judge, print, write after each run."""
    began, options = time.perf_counter(), parsed()
    tokenizer: Any = nybble.load(options.smollm2 or options.model)[1]
    if tokenizer is None:
        raise ModelError(f"{options.model} has no tokenizer.")
    data, held = (
        load_examples(str(options.data / f"{name}.jsonl"), tokenizer, seq_len=options.seq_len)
        for name in ("train", "held")
    )
    judged = held.rows[:: max(1, len(held.rows) // options.held)][: options.held]
    request = request_of(options, data, held, len(judged))
    result: Row = {"what": (__doc__ or "").split("\n")[0], **request, "versions": with_peers(), "runs": {}}
    if options.out and options.out.exists():
        old = read_json(options.out)
        if all(old.get(key) == value for key, value in {**request, "versions": result["versions"]}.items()):
            result["runs"] = old["runs"]
    reasons = {variant: why for variant in options.variants if (why := missing(variant))}
    result["left_out"] = reasons
    longest: dict[str, float] = {}
    for seed in range(options.seeds):
        for variant in (name for name in options.variants if name not in reasons):
            known = result["runs"].setdefault(variant, {})
            needs = longest.get(variant, max(longest.values(), default=0.0))
            if str(seed) in known or time.perf_counter() - began + needs > options.seconds:
                continue
            start = time.perf_counter()
            before = next((row["before"] for row in known.values()), None)
            known[str(seed)] = run(variant, seed, options, data.rows, judged, before)
            longest[variant] = max(longest.get(variant, 0.0), time.perf_counter() - start)
            found = known[str(seed)]
            print(
                f"{variant}, seed {seed}: {found['before']:.4f} -> {found['after']:.4f} in "
                f"{longest[variant]:.0f} s of {time.perf_counter() - began:.0f}",
                flush=True,
            )
            rows = summary(result["runs"])
            result["summary"] = rows
            result["bar"] = {"most": BAR, **{row["variant"]: row["ratio"] for row in rows if row["variant"] in JUDGED}}
            if options.out:
                atomic_write_json(options.out, result)
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
    shown(summary(result["runs"]))
    for variant, why in reasons.items():
        print(f"{variant} was left out: {why}")
    print(f"bar: {result.get('bar')}")


if __name__ == "__main__":
    main()
