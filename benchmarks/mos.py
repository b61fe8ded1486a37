"""Mixture-of-Supernets: what slices score in a supernet, and what the same networks score trained alone.

    python -m benchmarks.translations build/ternary_binary/data           # on Debian 12
    python benchmarks/mos.py translation --device cuda --seeds 0 1 2 --out benchmarks/results/mos_translation.json
    python -m benchmarks.ladder                                            # for its texts
    python benchmarks/mos.py encoder --device cuda --seeds 0 1 2 --out benchmarks/results/mos_encoder.json

``translation``: English to Romanian and German, strings of LibreOffice; BART of at most 4 + 4 layers of 256, that
differ in width, feed-forward widths, heads and decoder layers. ``encoder``: masked tokens of manuals of packages; BERT
of 4 layers of 256, each with a width of its own between bottlenecks. Three supernets (plain sharing; two experts mixed
by layer; by neuron) and random architectures alone have the same updates, examples and losses. BLEU (sacrebleu), nats
and accuracy are of held-out texts; of translation the means of both languages. ``gap`` is alone minus slice, ``tau``
Kendall's over the architectures; intervals are percentiles of 2,000 resamplings of the architectures. ``further``
trains slices on, until they have the nats of the network alone. What is behind ``search`` is evolution under a share of
the largest network's measured latency (``translation``) or parameters (``encoder``), its best not trained since;
``overhead`` times updates of the three in turns, with nothing beside them. Rows that are done are in ``--work``; a
second call goes on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks import ternary_binary
from benchmarks.at_once import arguments, file_of, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nybble.core.files import atomic_write_json
from nybble.core.seeds import derive_seed
from nybble.core.versions import versions
from nybble.models.own.bottleneck import BottleneckConfig, BottleneckForMaskedLM
from nybble.models.sources.open import open_source
from nybble.search.architectures import Study, Training
from nybble.search.architectures._budget import parse_budget
from nybble.search.architectures.mos import Looked, MixtureOfSupernets, batches_of
from nybble.search.evolution import Encoding, Evolution
from nybble.search.kept import Kept
from nybble.search.supernet.net import Supernet
from nybble.search.supernet.sandwich import Sandwich
from nybble.search.supernet.space import Space, make_space
from nybble.training.objective import make_losses

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"experts": 1}, "layer": {"experts": 2, "router": "layer"}, "neuron": {"experts": 2, "router": "neuron"},
}  # fmt: skip
RESAMPLED = 2000
MEASURES = {"translation": ("bleu", "nll"), "encoder": ("accuracy", "nll")}
SHARES = {"translation": ("latency", [0.6]), "encoder": ("parameters", [0.7, 0.8, 0.9])}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


# ------------------------------------------------------------------------------------------------------------ parts
def encoder(options: argparse.Namespace) -> tuple[Any, Any]:
    """A network that has learned nothing, and a tokenizer of the texts."""
    with lzma.open(texts(options, "train"), "rt", encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=options.vocabulary, special_tokens=SPECIAL, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )  # fmt: skip
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>",
    )  # fmt: skip
    torch.manual_seed(0)
    config = BottleneckConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64, intermediate_size=4 * options.width, pad_token_id=0,
        max_position_embeddings=options.length,
    )  # fmt: skip
    return BottleneckForMaskedLM(config), tokenizer


def texts(options: argparse.Namespace, part: str) -> Path:
    """Of the encoder: what trains, or what judges."""
    return Path(options.ladder / "texts" / f"{'calibration' if part == 'train' else 'held-out'}.jsonl.xz")


def space_of(config: Any) -> Space:
    """Sizes from a quarter on."""
    if hasattr(config, "widths"):
        return make_space(config, {"widths": [config.hidden_size * quarters // 4 for quarters in (1, 2, 3, 4)]})
    wide, heads = config.d_model, config.decoder_attention_heads
    choices = {
        "d_model": [wide // 2, 3 * wide // 4, wide],
        "encoder_ffn_dim": [wide, 2 * wide, 4 * wide], "decoder_ffn_dim": [wide, 2 * wide, 4 * wide],
        "encoder_attention_heads": [heads // 2, heads], "decoder_attention_heads": [heads // 2, heads],
        "decoder_layers": list(range(1, config.decoder_layers + 1)),
    }  # fmt: skip
    return make_space(config, choices)


def chosen(space: Space, count: int) -> list[Encoding]:
    """Different architectures, the same ones in every row."""
    torch.manual_seed(0)
    found = dict.fromkeys([tuple(int(torch.randint(size, (1,))) for size in space.sizes) for _ in range(10 * count)])
    return list(found)[:count]


def study_of(options: argparse.Namespace, name: str, seed: int, share: float = 1.0) -> Study:
    """A place to train at, whose model is the largest one, untrained."""
    origin = open_source(str(options.work / "float"))
    folder = file_of(options.work, name).with_suffix("")
    made: Any = origin.model(torch.float32, torch.device(options.device))
    budget = parse_budget(f"{SHARES[options.kind][0]}={share}", MixtureOfSupernets.budgets)
    pairs = options.kind == "translation"
    data, held = (options.work / f"{n}.jsonl" if pairs else texts(options, n) for n in ("train", "ro"))
    return Study(
        name=name, budget=budget, model=made, origin=origin, data=str(data), seq_len=options.length, seed=seed,
        device=options.device, folder=folder, keep=Kept(), judged_on=str(held),
    )  # fmt: skip


def training(options: argparse.Namespace, steps: int, lr: float) -> Training:
    """Of a supernet, or of a network alone."""
    gpu = options.device == "cuda"
    return Training(
        steps=steps, batch=options.batch, lr=lr, warmup=0.1, schedule="cosine", dtype="bfloat16" if gpu else "float32",
        optimizer="torch.AdamW betas=[0.9,0.98] weight_decay=0.01" + " fused=true" * gpu, save_every=500,
    )  # fmt: skip


def supernet_of(study: Study, kind: str) -> Supernet:
    """Untrained, or as its row left it."""
    torch.manual_seed(derive_seed(study.seed, "supernet"))
    study.model.requires_grad_(True)
    return Supernet(study.model, space_of(study.model.config), hidden=64, **KINDS[kind]).to(study.device)


def trained(
    options: argparse.Namespace, kind: str, seed: int, share: float = 1.0
) -> tuple[Study, Supernet, dict[str, Any], Any]:
    """A supernet, what its training told, and the examples."""
    study = study_of(options, f"{kind} #{seed}", seed, share)
    supernet, task = supernet_of(study, kind), study.task_for(study.model)
    rows = study.examples(study.model).rows
    objective = Sandwich(task, make_losses({"task": 1.0}), None)
    told = study.train(
        "supernet", supernet, rows, training(options, options.steps, options.lr), objective=objective
    )  # fmt: skip
    return study, supernet, {**told, "seconds": study.seconds["supernet"]}, rows


def judged(study: Study, options: argparse.Namespace, model: Any) -> dict[str, float]:
    """BLEU and nats by language, and their means; of an encoder the task's measures."""
    found: dict[str, float] = {}
    task = study.task_for(model)
    if options.kind == "encoder":
        return study.judge(model, study.held_out(study.model).rows[: options.held])
    for language in ternary_binary.LANGUAGES:
        src = str(options.work / f"{language}.jsonl")
        held = task.load(src, study.origin, model, options.length, "evaluation").rows  # type: ignore[arg-type]
        measures = study.judge(model, held)
        found |= {f"{name} {language}": measures[name] for name in ("bleu", "nll")}
    means = {n: statistics.mean(found[f"{n} {to}"] for to in ternary_binary.LANGUAGES) for n in ("bleu", "nll")}
    return found | means


# ------------------------------------------------------------------------------------------------------------- rows
def alone(options: argparse.Namespace, number: int, seed: int) -> dict[str, Any]:
    """An architecture that never was in a supernet."""
    study = study_of(options, f"alone {number} #{seed}", seed)
    space = space_of(study.model.config)
    encoding = chosen(space, options.architectures)[number]
    torch.manual_seed(derive_seed(seed, "alone", str(number)))
    made: Any = type(study.model)(space.config_of(encoding)).to(options.device)
    if options.kind == "translation":
        made.generation_config = study.model.generation_config
    study.train("alone", made, study.examples(made).rows, training(options, options.steps, options.lr))
    count = sum(p.numel() for p in made.parameters())
    words = {"architecture": space.values(encoding), "parameters": count}
    return {**words, **judged(study, options, made), "seconds": study.seconds["alone"]}


def sliced(options: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """A supernet, its slices, and what they need to be as good as alone."""
    study, supernet, told, _ = trained(options, kind, seed)
    encodings = chosen(supernet.space, options.architectures)
    slices = [judged(study, options, supernet.collapsed(encoding)) for encoding in encodings]
    size = sum(p.numel() for p in supernet.parameters())
    return {
        "slices": slices, "seconds": told["seconds"], "parameters": size,
        "optimizer_bytes": told["memory"]["optimizer states"], "curve": told["curve"][:: max(1, options.steps // 60)],
    }  # fmt: skip


def further(options: argparse.Namespace, kind: str, number: int, seed: int) -> dict[str, Any]:
    """A slice that trains on: nats a target token behind some numbers of updates."""
    study, supernet, _, rows = trained(options, kind, seed)
    encoding = chosen(supernet.space, options.architectures)[number]
    model, points = supernet.collapsed(encoding), {}
    before = 0
    for steps in options.further:
        more = replace(training(options, steps - before, options.lr / 5), warmup=0.0, schedule="constant")
        study.train(f"further-{number}-{steps}", model, rows, more)
        points[str(steps)], before = judged(study, options, model), steps
    return {"points": points}


def searched(options: argparse.Namespace, kind: str, share: float, seed: int) -> dict[str, Any]:
    """Evolution within a share of the largest network's cost, and the best found, untrained since."""
    study, supernet, _, _ = trained(options, kind, seed, share)
    held = study.held_out(study.model).rows[: options.held]
    batches = batches_of(study.task_for(study.model), held, options.device)
    looked = Looked(study, supernet, batches, Kept(options.work / "latency.jsonl"))
    loop = Evolution(population=options.population, parents=options.population // 4,
                     mutations=options.population // 3, crossovers=options.population // 3, generations=4)  # fmt: skip
    found = MixtureOfSupernets(evolution=loop).evolved(looked)
    best = found[0].encoding
    full = looked.cost(supernet.space.largest)
    return {
        "architecture": supernet.space.values(best), "unit": study.budget.unit, "cost": looked.cost(best), "full": full,
        "limit": study.budget.limit(full), "scored": len(found), **judged(study, options, supernet.collapsed(best)),
    }  # fmt: skip


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds an update of each supernet, in turns: forward, backward and AdamW's step on the same examples."""
    study = study_of(options, "overhead #0", 0)
    task, rows = study.task_for(study.model), study.examples(study.model).rows[: options.batch]
    batch = {name: t.to(options.device) for name, t in task.collate(rows).items()}
    half = torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda")
    made = {kind: supernet_of(study_of(options, f"overhead {kind}", 0), kind).train() for kind in KINDS}
    steps = {
        kind: torch.optim.AdamW(net.parameters(), 1e-5, fused=options.device == "cuda") for kind, net in made.items()
    }
    objective = Sandwich(task, make_losses({"task": 1.0}), None)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(options.turns + 3):
        for kind, net in made.items():
            torch.manual_seed(turn)
            began = time.perf_counter()
            with half:
                loss: Any = objective(net, batch, 0.0)
            loss.backward()
            steps[kind].step()
            steps[kind].zero_grad()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[kind] += [time.perf_counter() - began] * (turn > 2)
    ratios = {k: statistics.median(a / b for a, b in zip(seconds[k], seconds["plain"], strict=True)) for k in KINDS}
    return {"seconds": {kind: statistics.median(each) for kind, each in seconds.items()}, "ratios": ratios}


def row(options: argparse.Namespace) -> dict[str, Any]:
    """One row, by its name."""
    words, _, seed = options.row.rpartition(" #")
    match words.split():
        case ["overhead"]:
            return overhead(options)
        case ["alone", number]:
            return alone(options, int(number), int(seed))
        case ["search", kind, share]:
            return searched(options, kind, float(share), int(seed))
        case ["further", kind, number]:
            return further(options, kind, int(number), int(seed))
    return sliced(options, words, int(seed))


# ------------------------------------------------------------------------------------------------------------ study
def compared(rows: Mapping[str, Any], count: int, seeds: Sequence[int], measures: Sequence[str]) -> dict[str, Any]:
    """Gaps and Kendall's tau of each supernet, over all architectures and seeds that are done."""
    found: dict[str, Any] = {}
    for measure in measures:
        pairs: dict[str, list[tuple[int, int, float, float]]] = {
            kind: [
                (seed, number, rows[f"alone {number} #{seed}"][measure],
                 rows[f"{kind} #{seed}"]["slices"][number][measure])
                for seed in seeds for number in range(count)
                if f"alone {number} #{seed}" in rows and f"{kind} #{seed}" in rows
            ]
            for kind in KINDS
        }  # fmt: skip
        for kind, each in pairs.items():
            if not each:
                continue
            gaps = [abs(a - b) for _, _, a, b in each]
            taus = [tau_of([(a, b) for s, _, a, b in each if s == seed]) for seed in sorted({s for s, *_ in each})]
            shown = {"mean_gap": statistics.mean(gaps), "interval": interval(gaps), "tau": taus, "pairs": len(each)}
            if kind != "plain" and len(pairs["plain"]) == len(each):
                fewer = [abs(a - b) - gap for (_, _, a, b), gap in zip(pairs["plain"], gaps, strict=True)]
                shown |= {"below_plain": statistics.mean(fewer), "below_plain_interval": interval(fewer)}
            found[f"{measure}, {kind}"] = shown
    return found


def tau_of(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's; 0 where one side is all ties and orders nothing."""
    from scipy.stats import kendalltau

    found = float(kendalltau(*zip(*pairs, strict=True))[0])
    return 0.0 if math.isnan(found) else found


def interval(values: Sequence[float]) -> list[float]:
    """Of a mean: the middle 95 % of resamplings."""
    given = torch.tensor(values, dtype=torch.float64)
    drawn_from = torch.Generator().manual_seed(0)
    means = given[torch.randint(len(given), (RESAMPLED, len(given)), generator=drawn_from)].mean(1)
    return [float(torch.quantile(means, q)) for q in (0.025, 0.975)]


def needed(rows: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Updates until a slice has the nats of the network alone, by supernet; None: not within those that were made."""
    found: dict[str, list[Any]] = {}
    for name, each in rows.items():
        words, _, seed = name.rpartition(" #")
        if words.startswith("further ") and f"alone {words.split()[2]} #{seed}" in rows:
            aim = rows[f"alone {words.split()[2]} #{seed}"]["nll"]
            begun = rows[f"{words.split()[1]} #{seed}"]["slices"][int(words.split()[2])]["nll"]
            nats = {"0": begun, **{steps: point["nll"] for steps, point in each["points"].items()}}
            found.setdefault(words.split()[1], []).append(next((int(n) for n, x in nats.items() if x <= aim), None))
    return found


def shown(result: dict[str, Any]) -> None:
    """A line a supernet and measure."""
    for name, each in result["compared"].items():
        low, high = each["interval"]
        gap = f"mean |gap| {each['mean_gap']:.3f} [{low:.3f}, {high:.3f}]"
        less = (
            f", below plain {each['below_plain']:.3f} {each['below_plain_interval']}" if "below_plain" in each else ""
        )
        print(f"{name:14s} {gap}, tau {statistics.mean(each['tau']):.3f}, {each['pairs']} pairs{less}")
    print("further updates:", result["further"])
    for name, each in result["rows"].items():
        if name.startswith("search"):
            scores = ", ".join(f"{key} {each[key]:.4g}" for key in ("bleu", "accuracy", "nll") if key in each)
            print(f"{name}: {scores}, {each['cost']:,} of {each['full']:,} {each['unit']}, {each['architecture']}")
        if name.startswith("overhead"):
            print(f"{name}: {each}")


def main() -> None:
    """Rows side by side, then those that want the machine alone; print and write."""
    options = arguments(
        __doc__ or "", "mos", "benchmarks.translations", own, steps=1500, length=48, layers=4, vocabulary=6000,
        held=256, lr=1e-3, workers=15,
    )  # fmt: skip
    options.work = options.work / options.kind
    if options.row:
        atomic_write_json(file_of(options.work, options.row), row(options))
        return
    ends = time.monotonic() + options.seconds
    if not (options.work / "float" / "config.json").exists():
        model, tokenizer = encoder(options) if options.kind == "encoder" else ternary_binary.drawn(options)[:2]
        model.save_pretrained(options.work / "float")
        tokenizer.save_pretrained(options.work / "float")
    count, seeds = options.architectures, options.seeds
    first = [f"{name} #{seed}" for seed in seeds for name in (*KINDS, *(f"alone {n}" for n in range(count)))]
    later = [
        f"further {kind} {n} #{seed}" for seed in seeds for n in range(min(count, options.slices)) for kind in KINDS
    ]
    shares = options.shares or SHARES[options.kind][1]
    last = ["overhead #0", *(f"search {kind} {x} #{seed}" for seed in seeds for x in shares for kind in KINDS)]
    done: dict[str, Any] = {}
    for names, workers in ((first, options.workers), (later, options.workers), (last, 1)):
        wanted = [name for name in names if not options.rows or any(word in name for word in options.rows)]
        wanted = [name for name in wanted if names is first or begun(name, options)]
        done |= run(__file__, wanted, options.work, workers=workers, ends=ends, device=options.device)
    every = {name: json.loads(f.read_text()) for name in (*first, *later, *last)
             if (f := file_of(options.work, name)).exists()}  # fmt: skip
    asked = ("steps", "batch", "lr", "length", "layers", "width", "vocabulary", "held", "further", "seeds")
    told = compared(every, count, seeds, MEASURES[options.kind])
    result = {
        "what": (__doc__ or "").split("\n")[0], "versions": versions(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "training": {key: getattr(options, key) for key in asked}, "compared": told,
        "further": needed(every), "rows": every,
    }  # fmt: skip
    shown(result)
    if options.out:
        atomic_write_json(options.out, result)


def begun(name: str, options: argparse.Namespace) -> bool:
    """Whether the supernet is trained that a row begins with."""
    words, _, seed = name.rpartition(" #")
    return words == "overhead" or file_of(options.work, f"{words.split()[1]} #{seed}").exists()


def own(parser: argparse.ArgumentParser) -> None:
    """What other studies haven't."""
    parser.add_argument("kind", choices=sorted(MEASURES), help="what is trained")
    parser.add_argument("--architectures", type=int, default=12, help="random ones that are trained alone")
    parser.add_argument("--slices", type=int, default=3, help="of them, how many train on from each supernet")
    parser.add_argument("--further", type=int, nargs="*", default=[25, 50, 100, 200], help="updates of these")
    parser.add_argument("--shares", type=float, nargs="*", help="of the largest network's cost that searches have")
    parser.add_argument("--ladder", type=Path, default=Path("build/ladder"), help="what benchmarks/ladder wrote")
    parser.add_argument("--population", type=int, default=40)
    parser.add_argument("--turns", type=int, default=30, help="updates that are timed")


if __name__ == "__main__":
    main()
