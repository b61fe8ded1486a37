"""Diffusion models in few bits: FPQ's U-Net and FP4DiT's transformer on Fashion-MNIST, beside integers and rounding.

    apt-get install dataset-fashion-mnist
    python benchmarks/small_models.py resnet18 --out models/resnet18 --seconds 60 --device cuda
    python benchmarks/diffusion.py dit --classifier models/resnet18 --device cuda --out benchmarks/results/dit.json

and so for ``unet``. A model of diffusers learns 32 x 32 images of ten classes for ``--seconds`` (predicting the noise,
1,000 timesteps); every row quantizes its pipeline into a folder, and that folder samples. Rows that are done are in
``--work``; a second call goes on. FD is the Frechet distance in features of a classifier that learned apart, to real
test images and to the float model's own samples; ``self`` compares images of the same noise and class; ``noise`` is the
squared error of the noise that is seen on the float model's way, at its first, middle and last step; ``agreement``, the
classifier's with the class asked for, stands in for CLIP. Intervals: 95 %, bootstrap over samples.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.small_models import DEVIATION, FOLDER, MEAN, NAMES, Kind, find, tensors, trained
from transformers import AutoModelForImageClassification

import nybble
from nybble.calibration.trajectory import Sampling, noise_for, scheduler_of, steps
from nybble.checkpoint.account import inspect
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.data.images import Preparation
from nybble.data.labelled_images import load_labelled_images
from nybble.models.own._denoiser import diffusers
from nybble.models.pipeline_parts import scheduler_config
from nybble.pipelines.images import sample_latents
from nybble.pipelines.load import load_with_origin
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe

RESAMPLED = 40
GROUP = "group=128 pad=true"
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dit": ("transformer", "DiTTransformer2DModel", {
        "num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 1, "num_layers": 8, "sample_size": 32,
        "patch_size": 2, "num_embeds_ada_norm": 10}),
    "unet": ("unet", "UNet2DModel", {
        "sample_size": 32, "in_channels": 1, "out_channels": 1, "layers_per_block": 2, "num_class_embeds": 10,
        "block_out_channels": (64, 128, 128), "norm_num_groups": 16,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")}),
}  # fmt: skip


def steps_of(recipe: str, scheme: Any, **changes: Any) -> dict[str, Any]:
    """A recipe in another scheme, its reconstruction changed; ``reconstruction=False`` leaves that out."""
    found = load_recipe(recipe)
    kept = [step.to_dict() for step in found.steps if step.kind != "reconstruction" or changes.get("reconstruction", 1)]
    more = {key: value for key, value in changes.items() if key != "reconstruction"}
    given = [step | more if "reconstruction" in step else step for step in kept]
    return {"name": recipe, "scheme": scheme, "steps": given, "convolutions": "int8 plane"}


def rows(kind: str) -> dict[str, Any]:
    """What is quantized how: a recipe as quantize() takes it."""
    if kind == "unet":
        fp4, int4, int8 = ({"weights": f"{w} tensor", "inputs": f"{i} tensor static"} for w, i in (
            ("float4_e2m1fn", "e4m3_finite"), ("int4", "int8"), ("int8", "int8")))  # fmt: skip
        return {
            "FP8/FP8": "fpq8", "INT8/INT8": steps_of("fpq8", int8), "FP4/FP8 learned": "fpq",
            "FP4/FP8 nearest": steps_of("fpq", fp4, reconstruction=False), "INT4/INT8": steps_of("fpq8", int4),
            "INT4/INT8 learned": steps_of("fpq", int4),
        }  # fmt: skip
    scheme = load_recipe("fp4dit").scheme.to_dict()
    six = {**scheme, "rules": [{**rule, "inputs": "float6_e2m3fn token"} for rule in scheme["rules"]]}
    e2m1 = {"weights": f"float4_e2m1fn {GROUP}", "inputs": "e3m4_finite token"}
    integer = {"weights": f"int4 {GROUP}", "inputs": "int8 token"}
    plain = {"weights": {"adaround": {"scale_aware": False}}}
    return {
        "FP4DiT W4A8": "fp4dit", "FP4DiT W4A6": steps_of("fp4dit", six),
        "nearest W4A8": steps_of("fp4dit", scheme, reconstruction=False),
        "nearest W4A6": steps_of("fp4dit", six, reconstruction=False),
        "INT AdaRound W4A8": steps_of("fp4dit", integer, **plain, rates={"rounding": 0.01}),
        "INT AdaRound W4A6": steps_of("fp4dit", {**integer, "inputs": "int6 token"}, **plain, rates={"rounding": 0.01}),
        "plain AdaRound W4A8": steps_of("fp4dit", scheme, **plain),
        "E2M1 throughout W4A8": steps_of("fp4dit", e2m1),
        "one scale for all tokens W4A8": steps_of("fp4dit", {**e2m1, "inputs": "e3m4_finite tensor static"}),
    }  # fmt: skip


class Noising(nn.Module):
    """A denoiser with the loss that it learns by."""

    def __init__(self, net: Any, scheduler: Any) -> None:
        super().__init__()
        self.net, self.scheduler = net, scheduler

    def forward(self, images: Tensor, classes: Tensor) -> Any:
        """Squared error of the noise, at a timestep for each image."""
        noise, t = torch.randn_like(images), torch.randint(1000, (len(images),), device=images.device)
        told = self.net(self.scheduler.add_noise(images, noise, t), t, class_labels=classes).sample
        return SimpleNamespace(loss=functional.mse_loss(told.float(), noise))


def pictures(args: argparse.Namespace, part: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 32, 32] in -1 .. 1, black around, and classes."""
    wants = Preparation(height=28, width=28, channels=1, mean=(0.5,), std=(0.5,))
    images, classes = tensors(load_labelled_images(str(find(args.images, part)), wants, NAMES), args.most, args.device)
    return functional.pad(images, (2, 2, 2, 2), value=-1.0), classes


def begin(args: argparse.Namespace, folder: Path) -> None:
    """Train the float pipeline."""
    library = diffusers()
    part, name, shape = SHAPES[args.kind]
    scheduler = library.DDIMScheduler(clip_sample=True)
    torch.manual_seed(0)
    net = getattr(library, name)(**shape).to(args.device)
    images, classes = pictures(args, "train")

    def draw(count: int) -> dict[str, Tensor]:
        chosen = torch.randint(len(images), (count,), device=images.device)
        return {"images": images[chosen], "classes": classes[chosen]}

    kind = Kind(lambda: net, lambda *_: None, 3e-4 if args.kind == "dit" else 5e-4, 0.01, args.batch)  # type: ignore[arg-type, return-value]
    trained_with = argparse.Namespace(**{**vars(args), "steps": args.train_steps})
    done = trained(Noising(net, scheduler), draw, kind, trained_with)
    net.eval().cpu().save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "DiTPipeline" if args.kind == "dit" else "DDIMPipeline", "_diffusers_version": "0",
             part: ["diffusers", name], "scheduler": ["diffusers", "DDIMScheduler"]}  # fmt: skip
    atomic_write_json(folder / "trained.json", done | {"parameters": sum(p.numel() for p in net.parameters())})
    atomic_write_json(folder / "model_index.json", index)


# --------------------------------------------------------------------------------------------------------- measures
class Eye:
    """The classifier: features and classes of images."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = args.device
        self.net: Any = AutoModelForImageClassification.from_pretrained(args.classifier).eval().to(args.device)

    @torch.no_grad()
    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 features [n, d] and classes [n]."""
        features, classes = [], []
        for some in images.split(500):
            x = ((some.to(self.device).clamp(-1, 1) + 1) / 2)[..., 2:30, 2:30]
            out = self.net((x - MEAN) / DEVIATION, output_hidden_states=True)
            features.append(out.hidden_states[-1].mean((2, 3)).double())
            classes.append(out.logits.argmax(1).cpu())
        return torch.cat(features), torch.cat(classes)


def distance(one: Tensor, other: Tensor) -> float:
    """Frechet distance of two sets of features: |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2)."""
    covariances = [torch.cov(x.T) for x in (one, other)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return float(apart + covariances[0].trace() + covariances[1].trace() - 2 * both)


def interval(one: Tensor, other: Tensor) -> list[float]:
    """Of the distance: as far about it as 95 % of resampled sets lie about their mean, which repeated images raise."""
    draw = torch.Generator().manual_seed(0)
    found = sorted(
        distance(*(x[torch.randint(len(x), (len(x),), generator=draw).to(x.device)] for x in (one, other)))
        for _ in range(RESAMPLED)
    )
    here = distance(one, other) - sum(found) / len(found)
    return [here + found[round(0.025 * (RESAMPLED - 1))], here + found[round(0.975 * (RESAMPLED - 1))]]


@torch.no_grad()
def noises(model: Any, exact: Any, config: dict[str, Any], args: argparse.Namespace) -> list[float]:
    """Squared error of the noise on the float model's way, at its first, middle and last step."""
    sampling = Sampling(steps=args.sampling, seed=17)
    labels = {"class_labels": (torch.arange(64) % 10).to(args.device)}
    noise = noise_for(exact, 64, 17).to(args.device)
    found = []
    for inputs, wanted, _ in steps(exact, scheduler_of(config, "the pipeline"), noise, labels, sampling):
        told = model(**inputs).logits.float()[:, : wanted.shape[1]]
        found.append(float((told - wanted).square().mean()))
    return [found[0], found[len(found) // 2], found[-1]]


def sampled(model: Any, config: dict[str, Any], args: argparse.Namespace) -> Tensor:
    """Images of classes in turn, the same noise for all."""
    labels = {"class_labels": torch.arange(args.samples) % 10}
    sampling = Sampling(steps=args.sampling, seed=5)
    return sample_latents(model, config, args.samples, sampling, labels, batch=500)


def zeros(report: Any, model: Any) -> float:
    """Share of quantized weights that are zero."""
    weights = [model.get_submodule(row.name).weight for row in report.layers]
    found = [weight.qtensor().dequantize() for weight in weights if hasattr(weight, "qtensor")]
    return sum(int((w == 0).sum()) for w in found) / max(1, sum(w.numel() for w in found))


def judged(model: Any, exact: Any, images: Tensor, args: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """Measures of one model's images."""
    mine, classes = known["eye"].see(images)
    real, floats = known["real"], known["floats"]
    error = (images.clamp(-1, 1) - known["images"].clamp(-1, 1)).square().mean((1, 2, 3))
    asked = torch.arange(args.samples) % 10
    return {
        "fd_real": distance(mine, real), "fd_real_interval": interval(mine, real),
        "fd_float": distance(mine, floats), "fd_float_interval": interval(mine, floats),
        "self_mse": float(error.mean()), "self_psnr": float(10 * (4 / error.clamp(min=1e-12)).log10().mean()),
        "noise": noises(model, exact, known["config"], args),
        "agreement": float((classes == asked).double().mean()),
    }  # fmt: skip


def one(name: str, seed: int, folder: Path, exact: Any, args: argparse.Namespace, known: dict[str, Any]) -> Any:
    """Quantize into a folder, and judge what that samples."""
    out, began, recipe = (
        args.work / "packed" / f"{name} {seed}".replace("/", "-"),
        time.monotonic(),
        rows(args.kind)[name],
    )
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    made = load_recipe(recipe).to_dict() if isinstance(recipe, str) else dict(recipe)
    made["steps"] = [{**step, "steps": args.steps} if "reconstruction" in step else step for step in made["steps"]]
    settings = {"samples": args.calibration, "batch": 16, "seed": seed, "device": args.device, "dtype": "float32"}
    _, report = nybble.quantize(folder, made, out=out, settings=settings)
    seconds = time.monotonic() - began
    memory = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
    model, _ = load_with_origin(out, dtype="float32", device=args.device, dense=True)
    images = sampled(model, known["config"], args)
    formats = sorted({(Quantizer(str(row.weights)).format.name) for row in report.layers})
    return {
        **judged(model, exact, images, args, known), "seconds": round(seconds, 1), "peak_gpu_bytes": memory,
        "bytes": inspect(out)["total"], "formats": formats, "zeros": zeros(report, model),
    }  # fmt: skip


def main() -> None:
    """Train, quantize, sample, judge; print and write."""
    args = arguments()
    folder = args.work / "float"
    if not (folder / "model_index.json").exists():
        begin(args, folder)
    exact, _ = load_with_origin(folder, dtype="float32", device=args.device)
    config, eye = scheduler_config(folder), Eye(args)
    known: dict[str, Any] = {"eye": eye, "config": config, "images": sampled(exact, config, args)}
    real = pictures(args, "t10k")
    known |= {"real": eye.see(real[0])[0], "floats": eye.see(known["images"])[0]}
    result: dict[str, Any] = {
        "what": __doc__.split("\n")[0], "versions": versions() | {"diffusers": diffusers().__version__},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU",
        "options": {key: value for key, value in vars(args).items() if isinstance(value, int | float | str)},
        "trained": json.loads((folder / "trained.json").read_text()), "classifier_real": float(
            (eye.see(real[0])[1] == real[1].cpu()).double().mean()),
        "float": judged(exact, exact, known["images"], args, known), "rows": {},
    }  # fmt: skip
    for seed in args.seeds:
        for name in rows(args.kind):
            if args.rows and not any(word in name for word in args.rows):
                continue
            done = args.work / f"{name} {seed}.json".replace("/", "-")
            if not done.exists():
                atomic_write_json(done, one(name, seed, folder, exact, args, known))
            result["rows"][f"{name} #{seed}"] = found = json.loads(done.read_text())
            shown = {key: found[key] for key in ("fd_real", "fd_float", "self_psnr", "agreement", "seconds")}
            print(f"{name:32} #{seed}", {key: round(value, 4) for key, value in shown.items()}, flush=True)
            if args.out:
                atomic_write_json(args.out, result)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(SHAPES))
    parser.add_argument("--classifier", type=Path, required=True, help="what small_models.py wrote")
    parser.add_argument("--images", type=Path, default=FOLDER, help="where the IDX files are")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, default=Path("build/diffusion"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="of training")
    parser.add_argument("--train-steps", type=int, help="of training, in place of seconds")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--most", type=int, help="at most so many images of each part")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sampling", type=int, default=20, help="steps of the sampler")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2500, help="of a reconstruction")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="*", default=[], help="words in the names of the rows wanted")
    return parser.parse_args()


if __name__ == "__main__":
    main()
