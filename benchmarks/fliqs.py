"""FLIQS on small networks: formats searched in one training, against uniform, hand-made and random ones.

    apt-get install dataset-fashion-mnist
    python benchmarks/fliqs.py resnet18 --device cuda --seeds 0 1 2 --out benchmarks/results/fliqs_resnet18.json

and so for ``mobilenetv2`` and ``deit``; ``--memory`` measures a step's peak and seconds instead of rows. All layers are
searched, weights and inputs alike. A float model of benchmarks/small_models.py is where every row begins, and each has
as many updates; the target is 1.5 times the bit operations of uniform 4 bits. Random and hand-made choices cost as much
or less. A searched row is also retrained: its formats, from the float model, for as many updates again. Rows run side
by side; those that are done are in ``--work``, and a second call goes on. Judged is the packed folder, on the 10,000
test images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from benchmarks import small_qat
from benchmarks.at_once import Request, Study, arguments
from torch import Tensor, nn

from nybble.core.files import atomic_write_json
from nybble.core.seeds import generator
from nybble.core.versions import versions
from nybble.costs import Sized, make_cost
from nybble.learned import Learned, Menu
from nybble.nn.kinds import targets_of
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.search import search
from nybble.pipelines.search_job import SearchSettings
from nybble.pipelines.train import train
from nybble.search.groups import found_groups, see
from nybble.search.menu import parse_pairs
from nybble.search.problem import Problem
from nybble.search.recipe import load_search_recipe
from nybble.search.yardsticks import at_random
from nybble.training.callbacks import make_part
from nybble.training.policy import PolicyOptions
from nybble.training.prepare import prepare
from nybble.training.tasks import task_of

SHARE = 1.5
"""Of the bit operations of uniform 4 bits: the target."""
SMALL, SMALL_FP = ("int4", "int8", "bf16"), ("e2m1", "e4m3", "bf16")
LARGE = (
    "int2", "int3", "int4", "int5", "int6", "int7", "int8", "e2m1", "e3m2", "e2m3", "e4m3", "e5m2", "bf16"
)  # fmt: skip
WIDTH = {"int2": 2, "int4": 4, "int8": 8, "e2m1": 4, "e4m3": 8}


# --------------------------------------------------------------------------------------------------------------- rows
def network(options: argparse.Namespace) -> tuple[list[str], dict[str, int], list[list[int]]]:
    """Layers, multiply-accumulates of an image, groups that read one input."""
    return _network(options.work / "float", small_qat.examples(options, "t10k"))


@cache
def _network(folder: Path, data: str) -> tuple[list[str], dict[str, int], list[list[int]]]:
    model, origin = load_with_origin(folder, dtype="float32")
    task = task_of(model, "float")
    rows = task.load(data, origin, model, 1, "evaluation").rows[:1]
    targets = [*targets_of(model).values()]
    targets = [target for target in targets if target.matrices and type(target.kind).__name__ != "Embedding"]
    batch = task.collate(rows)
    seen = see(model.eval(), targets, lambda: model(**batch))  # type: ignore[operator]
    names = [target.name for target in targets if seen.macs[target.name]]
    return names, dict(seen.macs), found_groups(names, seen.readers)


def problem(options: argparse.Namespace, menu: Sequence[str]) -> Problem:
    """Costs of groups in each format, and the target; nothing is known of losses."""
    names, macs, groups = network(options)
    bops, pairs = make_cost("bops"), [*parse_pairs(list(menu)).values()]
    costs = [[sum(bops.of(_sized(names[i], macs, x), w) for i in members) for w, x in pairs] for members in groups]
    losses = torch.zeros(len(groups), len(menu), dtype=torch.float64)
    limit = int(SHARE * 16 * sum(macs[name] for name in names))
    return Problem(names=[names[members[0]] for members in groups], losses=losses, costs=costs, limit=limit)


def _sized(name: str, macs: Mapping[str, int], inputs: Any) -> Sized:
    return Sized(name=name, shape=(1, 1), macs=macs[name], inputs=inputs)


def fixed(choose: Callable[[argparse.Namespace], Mapping[str, str]]) -> Callable[[argparse.Namespace], Request]:
    """Quantization-aware training in formats by layer."""

    def asked(options: argparse.Namespace) -> Request:
        rules = []
        for name, item in choose(options).items():
            weights, inputs = parse_pairs([item])[item]
            rules.append({"targets": [name], "weights": str(weights), "inputs": str(inputs)})
        data = Path(small_qat.examples(options, "train"))
        return Request(
            recipe="qat", data=data, scheme={"rules": rules, "ignore": []}, options={}, settings=_settings(options)
        )

    return asked


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {"augment": "flip crop=2", "clip": 1.0}


def uniform(item: str, options: argparse.Namespace) -> dict[str, str]:
    """One for all layers."""
    return dict.fromkeys(network(options)[0], item)


def ends(options: argparse.Namespace) -> dict[str, str]:
    """8 bits for the first layer and the last, 4 between."""
    names = network(options)[0]
    return {name: "int8" if name in (names[0], names[-1]) else "int4" for name in names}


def drawn(number: int, options: argparse.Namespace) -> dict[str, str]:
    """At random, as near to the target as single changes bring it."""
    names, _, groups = network(options)
    choice = at_random(problem(options, SMALL), 0, number)
    return {names[i]: SMALL[item] for members, item in zip(groups, choice, strict=True) for i in members}


def searched(menu: Sequence[str], options: argparse.Namespace, **policy: Any) -> Request:
    """``nybble search --method fliqs``, and a training of what it found."""
    data = small_qat.examples(options, "train")

    def make(out: Path, settings: Mapping[str, Any]) -> Path:
        recipe = load_search_recipe("fliqs").to_dict()
        recipe["loop"]["policy"] |= policy
        method = out.with_suffix(".yaml")
        method.write_text(yaml.safe_dump(recipe))
        own = {key: settings[key] for key in ("device", "dtype", "seed", "resume")}
        loop = {key: value for key, value in settings.items() if key not in (*own, "seq_len")}
        if not out.exists():
            search(
                options.work / "float", out, budget=f"bops={problem(options, menu).limit}", menu=list(menu),
                method=str(method), data=data, ignore=(), training={**loop, **_settings(options)},
                settings=SearchSettings(**own),
            )  # fmt: skip
        again = out.with_name(f"{out.name}-again")
        if not again.exists() and not policy:
            scheme = yaml.safe_load((out / "scheme.yaml").read_text())
            train(
                "qat", options.work / "float", again, data, scheme=scheme, form="native",
                settings={**settings, **_settings(options)},
            )  # fmt: skip
        return out / "model"

    return Request(recipe="fliqs", data=Path(data), scheme=None, options={}, make=make)


ROWS: dict[str, Callable[[argparse.Namespace], Request]] = {
    **{f"uniform {item}": fixed(partial(uniform, item)) for item in WIDTH},
    "ends in 8 bits": fixed(ends),
    "FLIQS-S INT": partial(searched, SMALL),
    "FLIQS-S FP": partial(searched, SMALL_FP),
    "FLIQS-L": partial(searched, LARGE),
    "FLIQS-S INT, as published": partial(searched, SMALL, settle=1.0),
    "FLIQS-S INT, no entropy term": partial(searched, SMALL, entropy=0.0, settle=1.0),
    "FLIQS-S INT, constant": partial(searched, SMALL, schedule="constant", settle=1.0),
    **{f"random {number + 1}": fixed(partial(drawn, number)) for number in range(20)},
}


def judged(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and bytes; of a search its cost, the policy's end, and the accuracy of the retrained formats."""
    found, note = small_qat.judged(folder, options), folder.parent / "search.json"
    if folder.name != "model" or not note.exists():
        return found
    told = json.loads(note.read_text())
    again = folder.parent.with_name(f"{folder.parent.name}-again")
    more = {"retrained": small_qat.judged(again, options)["accuracy"]} if again.exists() else {}
    chosen = {row["name"]: row["chosen"] for row in told["layers"]}
    return {
        **found, **more, "bops": told["total"], "target": told["limit"], "entropy": told["policy"]["entropy"][-1],
        "chosen": chosen,
    }  # fmt: skip


def shown(result: dict[str, Any]) -> None:
    """A line a row: the mean of its seeds and half their range; random ones together."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row, found in result["rows"].items():
        name = row.rpartition(" #")[0]
        rows.setdefault("random" if name.startswith("random") else name, []).append(found)
    print(f"{'float':32s} {100 * result['float']['accuracy']:6.2f}")
    for name, found in rows.items():
        values = [100 * row["accuracy"] for row in found]
        line = f"{name:32s} {statistics.mean(values):6.2f} ({min(values):.2f} to {max(values):.2f}, n={len(values)})"
        if "bops" in found[0]:
            cost = statistics.mean(row["bops"] / row["target"] for row in found)
            line += f", cost {cost:.3f} of the target, entropy {statistics.mean(r['entropy'] for r in found):.3f} nats"
        again = [100 * row["retrained"] for row in found if "retrained" in row]
        print(line + (f", retrained {statistics.mean(again):.2f}" if again else ""))


# ------------------------------------------------------------------------------------------------------------- memory
def branching(menu: Menu, logits: nn.Parameter) -> Callable[..., Tensor]:
    """All choices at once, weighed by a softmax: what a differentiable search computes."""

    def estimate(x: Tensor) -> Tensor:
        dishes = [dish for dish in menu.dishes if isinstance(dish, Learned)]
        shares = torch.softmax(logits, 0)
        return torch.stack([share * dish.estimate(x) for share, dish in zip(shares, dishes, strict=True)]).sum(0)

    return estimate


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak bytes (of a GPU) and median seconds of a step: plain, searched, branching; by size of the menu."""
    found = []
    for size in (1, 2, 3, 6, 13):
        for way in ("policy", "branching") if size > 1 else ("plain",):
            found.append({"way": way, "menu": size, **_steps(options, LARGE[:size], way)})
            print(found[-1], flush=True)
    return found


def _steps(options: argparse.Namespace, menu: Sequence[str], way: str, steps: int = 12) -> dict[str, float]:
    gpu = options.device == "cuda"
    loaded, origin = load_with_origin(options.work / "float", dtype="float32", device=options.device)
    model: Any = loaded
    task = task_of(model, "float")
    rows = task.load(small_qat.examples(options, "t10k"), origin, model, 1, "evaluation").rows[: options.batch]
    batch = {name: tensor.to(options.device) for name, tensor in task.collate(rows).items()}
    (weights, inputs), *others = parse_pairs(list(menu)).values()
    menus = {"weights": {"menu": {"others": [str(w) for w, _ in others]}}}
    menus["inputs"] = {"menu": {"others": [str(x) for _, x in others]}}
    scheme = {"weights": str(weights), "inputs": str(inputs), "ignore": []}
    model = prepare(model.requires_grad_(True), scheme, menus).train()
    parameters, acting = [*model.parameters()], None
    if way == "policy":
        default = {field.name: field.default for field in fields(PolicyOptions)}
        acting = make_part("policy", {**default, "delay": 0.0, "target": 4.0}).attach(model)
    if way == "branching":
        for each in [module for module in model.modules() if isinstance(module, Menu)]:
            logits = nn.Parameter(torch.zeros(len(menu), device=options.device, dtype=torch.float32))
            parameters.append(logits)
            each.estimate = branching(each, logits)  # type: ignore[method-assign]
            each.estimate_in = lambda x, dtype, own=each: own.estimate(x).to(dtype)  # type: ignore[method-assign]
    optimizer, seconds = torch.optim.AdamW(parameters, lr=1e-5), []
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        began = time.perf_counter()
        if acting is not None:
            acting.before_forward(step / steps, generator(0, "memory", str(step)))
        with torch.autocast(options.device, torch.bfloat16, enabled=gpu):
            loss = model(**batch).loss
        if acting is not None:
            acting.after_forward(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = {"peak": float(torch.cuda.max_memory_allocated())} if gpu else {}
    return {**peak, "seconds": statistics.median(seconds[2:])}


def own(parser: argparse.ArgumentParser) -> None:
    """What other studies haven't."""
    parser.add_argument("kind", choices=small_qat.IMAGES, help="which float model")
    parser.add_argument("--images", type=Path, default=small_qat.small_models.FOLDER, help="where the IDX files are")
    parser.add_argument("--memory", action="store_true", help="measure steps; the float model has to be there")


if __name__ == "__main__":
    options = arguments(__doc__ or "", "fliqs", "small_models", own, steps=3000, float_steps=3000, lr=1e-3)
    options.work = options.work / options.kind
    if options.memory:
        told = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
        result = {"what": "a step's peak and seconds", "device": told, "batch": options.batch, "versions": versions()}
        result["rows"] = memory(options)
        if options.out:
            atomic_write_json(options.out, result)
    else:
        Study(
            script=__file__, doc=__doc__ or "", rows=ROWS, begin=small_qat.begin, judged=judged, shown=shown
        ).main(options)  # fmt: skip
