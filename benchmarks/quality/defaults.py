"""What the named recipes should do by default, judged on two language models.

    python benchmarks/quality/defaults.py [--device cuda] [--smollm2 FILE.gguf] [--record FILE] [--rows WORD ...]
        [--models smollm2 trained ladder-llama-10m ...] [--ladder FOLDER] [--seconds N] [--missing]

SmolLM2-135M-Instruct, and a llama of 8 blocks that this script trains for a minute on Python source files of the
installed packages, with SmolLM2's tokenizer. Each is calibrated on text of its own kind and judged on two texts that
nothing saw: SmolLM2 on the second half of ``builtin`` and on docstrings of the installed packages, the trained one on
two sets of held-out source files. A default has to be the better one on both models.

``ladder-NAME`` is a model of benchmarks/ladder (``--ladder``: its folder), calibrated on a part of the text that it was
trained on and judged on perl-doc, debian-reference-en and held-out documents of its training's packages.

``smollm2-manuals`` is SmolLM2 calibrated on calibration.jsonl.xz of ``--manuals`` (python3.11-doc and, behind it,
postgresql-doc-15, by benchmarks/texts.py) and judged on perl-doc.jsonl.xz and debian-reference-en.jsonl.xz there.

Beside perplexity stands what is generated: of 32 beginnings of 64 tokens of the first text each model greedily goes on
for 64. ``same`` is how many of these the float model says, too, before the first other one; ``distinct`` the share of
different groups of four tokens among all (a model that repeats itself has few), and ``float_nll`` the nats a token that
the float model loses on it.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import site
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from run import hardware
from torch import Tensor

import nybble
from nybble.core.errors import NybbleError
from nybble.core.versions import versions
from nybble.data import load_text, token_samples
from nybble.eval import evaluate_many
from nybble.models.sources.open import open_source
from nybble.nn.swap import hold_dense
from nybble.recipe import parse_recipe

E8M0 = "scale_format=(float8_e8m0fnu scale=one)"
MX = "float4_e2m1fn group=32 scale=pow2(mode={}) " + E8M0
Rows = dict[str, tuple[list[dict[str, Any]], dict[str, str]]]
RTN: list[dict[str, Any]] = [{"solver": "rtn"}]
PLAIN: list[dict[str, Any]] = [{"solver": "gptq", "activation_order": False}]
ORDER: list[dict[str, Any]] = [{"solver": "gptq", "activation_order": True}]


def smooth(alpha: float, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """SmoothQuant in front."""
    return [{"transform": "smooth", "alpha": alpha}, *steps]


def rows() -> Rows:
    """Steps and scheme by name."""
    found: Rows = {}
    for bits in (4, 3, 2):
        weights = {"weights": f"int{bits} group=64 symmetric=false"}
        found |= {f"INT{bits} g64 rtn": (RTN, weights), f"INT{bits} g64 gptq": (PLAIN, weights)}
        found[f"INT{bits} g64 gptq, order"] = (ORDER, weights)
    e2m1 = {"weights": "float4_e2m1fn group=32"}
    found |= {"E2M1 g32 gptq": (PLAIN, e2m1), "E2M1 g32 gptq, order": (ORDER, e2m1)}
    nvfp4 = {"weights": "nvfp4", "inputs": "nvfp4"}
    found |= {"NVFP4 rtn": (RTN, nvfp4), "NVFP4 gptq": (PLAIN, nvfp4), "NVFP4 gptq, order": (ORDER, nvfp4)}
    for alpha in (0.5, 0.6, 0.7, 0.8):
        found[f"NVFP4 smooth {alpha}, gptq, order"] = (smooth(alpha, ORDER), nvfp4)
    for mode in ("floor", "even", "rceil", "nearest", "search"):
        mx = {"weights": MX.format(mode), "inputs": MX.format(mode)}
        found[f"MXFP4 {mode} rtn"] = (RTN, mx)
        found[f"MXFP4 {mode} gptq, order"] = (ORDER, mx)
    mixed = {"weights": MX.format("search"), "inputs": MX.format("even")}
    found |= {"MXFP4 search x even rtn": (RTN, mixed), "MXFP4 search x even gptq, order": (ORDER, mixed)}
    even = {"weights": MX.format("even"), "inputs": MX.format("even")}
    for alpha in (0.5, 0.6, 0.7, 0.8):
        found[f"MXFP4 even smooth {alpha}, gptq, order"] = (smooth(alpha, ORDER), even)
    found["MXFP4 search x even smooth 0.7, gptq, order"] = (smooth(0.7, ORDER), mixed)
    return found


def main(about: str | None, known: Rows) -> None:
    """Quantize and judge every row of those known on both models."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smollm2", default="demo:smollm2")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--rows", nargs="*", default=[""], help="words that a row's name holds")
    parser.add_argument("--without", nargs="*", default=[], help="words that it doesn't hold")
    parser.add_argument("--models", nargs="*", default=["smollm2", "trained"], help="and ladder-NAME")
    parser.add_argument("--ladder", type=Path, default=Path("build/ladder"), help="what benchmarks/ladder wrote")
    parser.add_argument("--manuals", type=Path, default=Path("build/manuals"), help="texts of smollm2-manuals")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no other row is begun")
    parser.add_argument("--beside", type=int, default=0, help="how many other runs share the device, for the record")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; not 0: it stands in rows' names")
    parser.add_argument("--missing", action="store_true", help="leave out the rows that the record has")
    args = parser.parse_args()
    args.until = time.monotonic() + args.seconds
    chosen = {name: row for name, row in known.items() if any(word in name for word in args.rows)}
    chosen = {name: row for name, row in chosen.items() if not any(word in name for word in args.without)}
    for name in args.models:
        if name not in ("smollm2", "smollm2-manuals", "trained") and not name.startswith("ladder-"):
            parser.error(f"no model {name}: smollm2, smollm2-manuals, trained, or ladder-NAME")
        if name.startswith("ladder-"):
            rung(name.removeprefix("ladder-"), chosen, args)
    if not {"smollm2", "smollm2-manuals", "trained"} & set(args.models):
        return
    source = open_source(args.smollm2)
    tokenizer = source.tokenizer()
    if "smollm2-manuals" in args.models:
        texts = document_texts(args.manuals, ("perl-doc", "debian-reference-en"), tokenizer, args)
        judge("SmolLM2-135M-Instruct, manuals", args.smollm2, *texts, chosen, args)
    files = python_files()
    with tempfile.TemporaryDirectory() as place:
        if "smollm2" in args.models:
            calibration = sample("builtin", "calibration", tokenizer, args.samples, args)
            held = sample("builtin", "evaluation", tokenizer, args.windows, args)
            docs = cut(tokenizer, docstrings(files[-300:]), args.seq_len)[: args.windows]
            texts = {"builtin": held.input_ids, "docstrings": docs}
            judge("SmolLM2-135M-Instruct", args.smollm2, calibration, texts, chosen, args)
        if "trained" in args.models:
            tokens = cut(tokenizer, read(files[:-300]), args.seq_len)
            train(tokenizer, tokens, args).save_pretrained(place)
            tokenizer.save_pretrained(place)
            lines = Path(place) / "code.jsonl"
            lines.write_text("\n".join(json.dumps({"text": text}) for text in read(files[:300])), encoding="utf-8")
            calibration = sample(str(lines), "calibration", tokenizer, args.samples, args)
            parts = {"held-out code": files[-300:-100], "more code": files[-100:]}
            texts = {name: cut(tokenizer, read(part), args.seq_len)[: args.windows] for name, part in parts.items()}
            judge("llama of 8 blocks, trained here", place, calibration, texts, chosen, args)


def rung(name: str, chosen: dict[str, Any], args: argparse.Namespace) -> None:
    """Judge the rows on a model of the ladder."""
    folder = args.ladder / "models" / name
    if not folder.is_dir():
        raise SystemExit(
            f"no {folder}: train it (python -m benchmarks.ladder) or give --ladder the folder with models/"
        )
    judge(f"ladder {name}", str(folder), *ladder_texts(open_source(str(folder)).tokenizer(), args), chosen, args)


def ladder_texts(tokenizer: Any, args: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """Samples of the ladder's calibration text, and windows of its three held-out ones."""
    return document_texts(args.ladder / "texts", ("held-out", "perl-doc", "debian-reference-en"), tokenizer, args)


def document_texts(
    texts: Path, names: tuple[str, ...], tokenizer: Any, args: argparse.Namespace
) -> tuple[Any, dict[str, Tensor]]:
    """Samples of a folder's calibration text, and windows of its held-out ones."""
    calibration = sample(str(texts / "calibration.jsonl.xz"), "calibration", tokenizer, args.samples, args)
    held = {}
    for text in names:
        with lzma.open(texts / f"{text}.jsonl.xz", "rt", encoding="utf-8") as lines:
            documents = [tokenizer.eos_token + json.loads(line)["text"] for line in lines]
        windows = cut(tokenizer, documents, args.seq_len)
        held[text] = windows[:: max(1, len(windows) // args.windows)][: args.windows]  # of all its documents
    return calibration, held


def sample(text: str, part: str, tokenizer: Any, samples: int, args: argparse.Namespace) -> Any:
    """Tokens of a text for one use."""
    return token_samples(load_text(text, part, tokenizer), tokenizer, samples=samples, seq_len=args.seq_len)


def record(path: Path | None, model: str, name: str, row: dict[str, Any], device: str) -> None:
    """Put a row into the results, in place of an earlier one of this name."""
    print(name, json.dumps(row), flush=True)
    if path is not None:
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": {}}
        result |= {"hardware": hardware(device), "versions": versions()}
        result["models"].setdefault(model, {})[name] = row
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def recorded(path: Path | None, model: str) -> dict[str, Any]:
    """The rows of a model that the results have."""
    found = json.loads(path.read_text(encoding="utf-8"))["models"] if path is not None and path.exists() else {}
    return dict(found.get(model, {}))


def judge(
    title: str,
    model: str,
    calibration: Any,
    texts: dict[str, Tensor],
    chosen: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Perplexity of the float model and of every row on each text, and seconds."""
    reference = nybble.load(model, device=args.device)[0]
    begins = next(iter(texts.values()))[:32, :64]
    exact = generated(reference, begins)
    row = {"bits": 16.0, "ppl": perplexity(reference, texts), "generated": generation(exact, exact, reference)}
    record(args.record, title, "float", row, args.device)
    settings = nybble.Settings(batch=8, device=args.device, seed=args.seed)
    for plain, (steps, scheme) in chosen.items():
        name = f"{plain}, seed {args.seed}" if args.seed else plain
        if time.monotonic() > args.until:
            print(f"{title}: {name} and what follows is left for another run")
            return
        if args.missing and name in recorded(args.record, title):
            continue
        recipe = parse_recipe({"name": plain.replace(" ", "-"), "scheme": scheme, "steps": steps})
        started = time.perf_counter()
        try:
            made, report = nybble.quantize(model, recipe, calibration, settings=settings)
        except NybbleError as refusal:  # a rotation of a stream with LayerNorms, a group that doesn't divide
            print(f"{title}: {name} is refused: {refusal}", flush=True)
            continue
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        hold_dense(made, torch.bfloat16)
        row = {"bits": report.bits, "seconds": round(seconds, 1), "ppl": perplexity(made, texts)}
        row["generated"] = generation(generated(made, begins), exact, reference)
        row |= {"beside": args.beside} if args.beside else {}
        record(args.record, title, name, row, args.device)


@torch.no_grad()
def perplexity(model: Any, texts: dict[str, Tensor]) -> dict[str, float]:
    """On each text."""
    return {
        name: evaluate_many(None, {"model": model}, ids, ("ppl",))["model"].metrics["ppl"]
        for name, ids in texts.items()
    }


@torch.no_grad()
def generated(model: Any, begins: Tensor, tokens: int = 64) -> Tensor:
    """How a model goes on greedily, and what from: int64 [beginnings, length + tokens], on its device."""
    ids = begins.to(next(model.parameters()).device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found


@torch.no_grad()
def generation(found: Tensor, exact: Tensor, reference: Any, begins: int = 64) -> dict[str, float]:
    """How good it is, beside what the float model says."""
    new = found[:, begins:]
    same = (new == exact[:, begins:]).cumprod(-1).sum(-1).float().mean().item()
    groups = new.unfold(-1, 4, 1).reshape(-1, 4)
    losses = torch.nn.functional.cross_entropy(
        reference(found).logits[:, begins - 1 : -1].float().transpose(1, 2), new, reduction="none"
    )
    distinct = len(groups.unique(dim=0)) / len(groups)
    return {"same": same, "distinct": distinct, "float_nll": losses.mean().item()}


def python_files() -> list[Path]:
    """Source files of the standard library and the installed packages, in an order that repeats."""
    places = {sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], *site.getsitepackages()}
    found = {path for place in places for path in Path(place).rglob("*.py") if 4_000 < path.stat().st_size < 100_000}
    ordered = sorted(found, key=lambda path: (path.name, path.stat().st_size, str(path)))
    random.Random(0).shuffle(ordered)
    return ordered[:3000]


def read(paths: list[Path]) -> list[str]:
    """Their texts."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def docstrings(paths: list[Path]) -> list[str]:
    """What stands between triple quotes in them."""
    return ["\n".join(part for part in text.split('"""')[1::2] if len(part) > 200) for text in read(paths)]


def cut(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Tokens of all texts one after another, int64 [windows, length]."""
    ids = torch.tensor([i for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in encoded])
    return ids[: len(ids) // length * length].reshape(-1, length)


def train(tokenizer: Any, tokens: Tensor, args: argparse.Namespace) -> Any:
    """A llama of 8 blocks after ``args.steps`` steps of 32 windows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps, pct_start=0.05)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).repeat(
        1 + 32 * args.steps // len(tokens)
    )
    started = time.perf_counter()
    for step in range(args.steps):
        batch = tokens[order[32 * step : 32 * (step + 1)]].to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return model.to(torch.bfloat16).cpu()


if __name__ == "__main__":
    main(__doc__, rows())
