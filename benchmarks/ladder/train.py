"""Trains one model of the ladder; ``python -m benchmarks.ladder`` runs it for each.

AdamW (0.9, 0.95; decay 0.1 on matrices), gradients cut at norm 1, bf16 autocast on a GPU, float32 master weights. The
rate rises over 100 steps, stays, and falls to zero over the last quarter of the steps: unlike a cosine this can end
where the time does. In the last quarter of the time left, no more steps are planned than it allows, so that a slow
machine gives a finished model of fewer tokens (``tokens`` beside ``planned_tokens``), never none. Where time doesn't
bind, the same seed, machine and versions see the same windows in the same order.

The result is a folder of transformers' in bfloat16, in files of at most 15 MB, with its tokenizer and training.json.
Losses on held-out text are of these bfloat16 weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.ladder.sizes import CONTEXT, SIZES, build, without_embeddings
from benchmarks.ladder.text import HELD_OUT, read_ids
from torch import Tensor

from nybble.core.files import atomic_write_bytes
from nybble.core.versions import versions

WARM_UP = 100  # steps
FALL = 0.25  # of the steps, and of the time
WINDOWS = 200  # of each held-out text
MODES = ("reduce-overhead", "default", None)  # of torch.compile, the first that works; None: not compiled


@dataclass(kw_only=True)
class Clock:
    """Which step is the last, and the rate until then.

    Attributes:
        planned: steps. started, deadline: seconds of ``time.monotonic``.
        end: the step before which training stops, as it looks now.
    """

    planned: int
    started: float
    deadline: float
    end: int = 0

    def __post_init__(self) -> None:
        self.end = self.planned

    def look(self, step: int, now: float, seconds_a_step: float) -> None:
        """Plan again, where little time is left."""
        left = self.deadline - now
        if left < FALL * (self.deadline - self.started):
            self.end = min(self.planned, step + max(0, int(left / seconds_a_step)))

    def factor(self, step: int) -> float:
        """Of the maximal rate: 1 but at both ends."""
        rise = (step + 1) / min(WARM_UP, max(1, self.planned // 10))
        return max(0.0, min(1.0, rise, (self.end - step) / max(1.0, FALL * self.planned)))


def starts(length: int, windows: int, steps: int, seed: int, context: int = CONTEXT) -> Iterator[Tensor]:
    """Where the windows of each step begin, int64 [windows], in text of ``length`` tokens.

    Each pass over the text cuts it at another offset and takes all its whole windows once, in a random order.
    """
    if length < 2 * context:
        raise ValueError(f"{length} tokens of text; windows of {context} need at least twice as many")
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(waiting) < windows:
            offset = int(torch.randint(context, (), generator=generator))
            order = torch.randperm((length - offset) // context, generator=generator)
            waiting = torch.cat([waiting, offset + context * order])
        yield waiting[:windows]
        waiting = waiting[windows:]


class Training:
    """One model under way."""

    def __init__(self, model: Any, ids: np.ndarray[Any, Any], rate: float, device: str) -> None:
        self.model, self.rate, self.device = model.to(device).train(), rate, device
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.window = torch.arange(CONTEXT, device=device)
        self.forward: Callable[..., Any] = model
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.AdamW:
        """Matrices decay; gains and biases don't."""
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), fused=self.device == "cuda")

    def step(self, begin: Tensor, factor: float) -> Tensor:
        """One step on the windows that begin there; the loss before it, a scalar on the device."""
        batch = self.ids[begin.to(self.device)[:, None] + self.window].long()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        if self.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.forward(input_ids=batch, labels=batch, use_cache=False).loss
        kept: Tensor = loss.detach().clone()  # a graph's output is overwritten by its next run
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return kept

    def compile(self, windows: int, modes: tuple[str | None, ...]) -> str:
        """Take the first mode in which four steps work; the model is as before afterwards. Returns its name."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for mode in modes:
            try:
                self.forward = self.model if mode is None else torch.compile(self.model, mode=mode, dynamic=False)
                for begin in starts(len(self.ids), windows, 4, seed=1):
                    self.step(begin, 0.0).item()
            except Exception as error:
                if mode is None:
                    raise
                print(f"torch.compile, mode {mode}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
                torch._dynamo.reset()
                self.optimizer.zero_grad(set_to_none=True)
                continue
            break
        self.model.load_state_dict(before)
        self.optimizer = self.new_optimizer()
        return mode or "eager"

    def run(self, clock: Clock, windows: int, seed: int) -> tuple[int, list[list[float]]]:
        """All steps; how many there were, and [step, mean loss of the steps up to it since the last entry]."""
        every = max(1, min(50, clock.planned // 20))
        curve: list[list[float]] = []
        total, seen, last = torch.zeros((), device=self.device), 0, time.monotonic()
        step = 0
        for step, begin in enumerate(starts(len(self.ids), windows, clock.planned, seed)):
            if step >= clock.end:
                break
            total += self.step(begin, clock.factor(step))
            seen += 1
            if seen == every or step + 1 == clock.end:
                mean = total.item() / seen
                now = time.monotonic()
                clock.look(step + 1, now, (now - last) / seen)
                curve.append([step + 1, round(mean, 4)])
                print(
                    f"step {step + 1} of {clock.end}: loss {mean:.3f}, {1e3 * (now - last) / seen:.1f} ms", flush=True
                )
                if not math.isfinite(mean):
                    raise SystemExit(f"the loss is {mean} at step {step + 1}: a lower rate than {self.rate} may help")
                total, seen, last = torch.zeros((), device=self.device), 0, now
        return min(clock.end, step + 1), curve


@torch.no_grad()
def held_out(model: Any, ids: np.ndarray[Any, Any], device: str, windows: int = WINDOWS) -> dict[str, float]:
    """Mean negative log likelihood of a token in nats over windows at even distances, each read from its start."""
    found = torch.from_numpy(ids[: len(ids) // CONTEXT * CONTEXT].astype(np.int64)).view(-1, CONTEXT)
    found = found[torch.arange(min(windows, len(found))) * len(found) // min(windows, len(found))]
    total = 0.0
    for batch in found.to(device).chunk(max(1, len(found) // 20)):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    predictions = len(found) * (CONTEXT - 1)
    return {"nll": round(total / predictions, 5), "ppl": round(math.exp(total / predictions), 4), "tokens": predictions}


def hardware(device: str) -> dict[str, Any]:
    """Names of the processor and the GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def train(folder: Path, name: str, steps: int, deadline: float, device: str, compiles: bool) -> dict[str, Any]:
    """Train a model, write its folder under ``folder/models``, return its record."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    began = time.monotonic()
    architecture, size = name.split("-", 1)
    rung, seed = SIZES[size], 0
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    model = build(architecture, size, len(tokenizer))
    ids = read_ids(folder, "train")
    under_way = Training(model, ids, rung.rate, device)
    mode = under_way.compile(rung.batch, MODES) if compiles else "eager"
    started = time.monotonic()
    clock = Clock(planned=steps, started=began, deadline=deadline)
    done, curve = under_way.run(clock, rung.batch, seed)
    seconds = time.monotonic() - started
    place = folder / "models" / name
    model.to(torch.bfloat16).save_pretrained(place, max_shard_size="15MB")
    tokenizer.save_pretrained(place)
    # What is judged is what others load; .to() also rounds the rotary frequencies, which a folder doesn't hold.
    loaded: Any = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
    model = loaded.to(device).eval()
    texts = {text: held_out(model, read_ids(folder, text), device) for text in ("held-out", *HELD_OUT)}
    late = [loss for step, loss in curve if step > 0.9 * done] or [curve[-1][1]]
    parameters = without_embeddings(model)
    record = {
        "parameters": parameters,
        "embeddings": sum(p.numel() for p in model.parameters()) - parameters,
        "tokens": done * rung.batch * CONTEXT,
        "planned_tokens": steps * rung.batch * CONTEXT,
        "passes": round(done * rung.batch * CONTEXT / len(ids), 2),
        "train_loss": round(sum(late) / len(late), 4),
        "held_out": texts,
        "seconds": round(seconds, 1),
        "rate": rung.rate, "batch": rung.batch, "context": CONTEXT, "seed": seed, "mode": mode, "dtype": "bfloat16",
        "hardware": hardware(device), "versions": versions(),
        "curve": curve[:: max(1, len(curve) // 20)],
    }  # fmt: skip
    atomic_write_bytes(place / "training.json", (json.dumps(record, indent=1) + "\n").encode())
    print(f"{name}: {record['tokens'] / 1e6:.1f}M tokens in {seconds:.0f} s, {texts}", flush=True)
    return record


def main() -> None:
    """Train the model asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that text.py wrote")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf, help="from now on, for training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="don't compile")
    asked = parser.parse_args()
    deadline = time.monotonic() + asked.seconds
    train(asked.folder, asked.model, asked.steps, deadline, asked.device, not asked.eager)


if __name__ == "__main__":
    main()
