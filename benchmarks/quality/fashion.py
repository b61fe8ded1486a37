"""Fashion-MNIST for the scripts here: its images, training on them, and what a trained network is kept as.

    apt-get install dataset-fashion-mnist

60,000 images train, 10,000 judge. Where the package can't be installed, its four files will do in any folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import hardware
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nybble.core.progress import Bars, task
from nybble.data.images import ImageSamples, Preparation, image_samples

FOLDER = Path("/usr/share/datasets/fashion-mnist")
WANTS = Preparation(height=28, width=28, channels=1, mean=(0.286,), std=(0.353,))
Logits = Callable[[nn.Module, Tensor], Tensor]


def find(folder: Path, part: str) -> Path:
    """The IDX file of a part, ``train`` or ``t10k``, wherever the package keeps it."""
    found = sorted(folder.rglob(f"{part}-images-idx3-ubyte*"))
    if not found:
        raise SystemExit(f"{folder} holds no {part}-images-idx3-ubyte; apt-get install dataset-fashion-mnist")
    return found[0]


def images(
    folder: Path, part: str, samples: int | None = None, seed: int | None = None, wants: Preparation = WANTS
) -> ImageSamples:
    """Images of a part as a network wants them; ``samples`` of all, evenly spread or as ``seed`` draws them."""
    return image_samples(str(find(folder, part)), wants, samples=samples, seed=seed, fewer=True)


def call(network: nn.Module, x: Tensor) -> Tensor:
    """Logits of a plain network."""
    found: Tensor = network(x)
    return found


def call_model(network: nn.Module, x: Tensor) -> Tensor:
    """Logits of a model of transformers."""
    found: Tensor = network(pixel_values=x).logits
    return found


def train(
    network: nn.Module,
    samples: ImageSamples,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch: int,
    rise: float,
    device: str = "cpu",
    logits: Logits = call,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
    bfloat16: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Train with one cycle of the optimizer's rate, flips and shifts of two pixels; returns it in eval mode.

    Args:
        network: on the device.
        samples: labelled.
        optimizer: of its parameters, at its highest rate.
        epochs: over all whole batches.
        batch: images of a step.
        rise: share of the steps in which the rate rises.
        device: where.
        logits: calls the network.
        prepare: what is done to the images of a batch, after they were moved about.
        bfloat16: products in bfloat16.
        seed: of the order, and of flips and shifts.
    """
    torch.manual_seed(seed)
    network.train()
    assert samples.labels is not None
    pixels, labels = samples.pixel_values.to(device), samples.labels.to(device)
    steps, loss = epochs * (len(pixels) // batch), torch.zeros(())
    highest = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=steps, pct_start=rise)
    with task(Bars(), epochs, "train") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(pixels), device=device)
            for start in range(0, len(pixels) - batch + 1, batch):
                chosen = order[start : start + batch]
                x = pixels[chosen]
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
                x = prepare(x.roll(torch.randint(-2, 3, (2,)).tolist(), (-2, -1)))
                with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                    loss = nn.functional.cross_entropy(logits(network, x).float(), labels[chosen])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            bar.advance(note=f"loss {float(loss.detach()):.3f}")
    return network.eval().requires_grad_(False)


def kept(
    folder: Path, build: Callable[[], nn.Module], make: Callable[[], nn.Module], **about: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained network from a folder, and how it was trained; made, and put there, where it isn't yet.

    Args:
        folder: of this network.
        build: gives it with any weights.
        make: gives it trained.
        about: how. Where another was trained otherwise, that is an error.
    """
    file, said = folder / "model.safetensors", folder / "training.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = make()
        device = next(made.parameters()).device.type
        said.write_text(json.dumps(about | {"hardware": hardware(device)}), encoding="utf-8")
        save_file({key: value.contiguous().cpu() for key, value in made.state_dict().items()}, file)
    found = json.loads(said.read_text(encoding="utf-8"))
    if {key: found.get(key) for key in about} != about:
        raise SystemExit(f"{folder} holds a network that was trained otherwise: {found}; remove it, or give --work.")
    network = build()
    network.load_state_dict(load_file(file))
    return network.eval().requires_grad_(False), found
