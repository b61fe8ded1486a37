"""Denoisers of diffusers: the same numbers as diffusers', every layer classified, pipelines kept whole, bad folders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.diffusion import NETWORKS, diffusers, inputs, network, save_pipeline, save_prompts
from torch import nn

import nybble
from nybble.calibration.block import BlockState
from nybble.calibration.prompts import encoded
from nybble.calibration.trace import HIDDEN, capture_block_calls
from nybble.calibration.trajectory import (
    Sampling,
    TrajectorySamples,
    class_labels,
    noise_for,
    scheduler_of,
    steps,
    trajectory_samples,
)
from nybble.calibration.units import find_units
from nybble.core.errors import DataError, FileError, ModelError, UsageError
from nybble.core.progress import Silent
from nybble.eval.judges import Panel, judge_of
from nybble.models.adapter import adapter_for
from nybble.models.pipeline_parts import read_parts, scheduler_config
from nybble.models.sources.open import open_source
from nybble.pipelines.images import load_pipeline, sample_latents

SETTINGS: dict[str, Any] = {"samples": 6, "batch": 3, "dtype": "float32"}
KEPT = {  # what papers leave in float; everything else that multiplies is quantized
    "dit": {"pos_embed.proj", "proj_out_1", "proj_out_2"}
    | {f"transformer_blocks.{b}.norm1.emb.timestep_embedder.linear_{i}" for b in (0, 1) for i in (1, 2)},
    "pixart": {"pos_embed.proj", "proj_out", "adaln_single.linear"}
    | {f"{p}.linear_{i}" for p in ("adaln_single.emb.timestep_embedder", "caption_projection") for i in (1, 2)},
    "hunyuan": {"pos_embed.proj", "proj_out", "norm_out.linear", "time_extra_emb.pooler.k_proj"}
    | {f"time_extra_emb.pooler.{p}_proj" for p in ("q", "v", "c")}
    | {f"{p}.linear_{i}" for p in ("time_extra_emb.timestep_embedder", "time_extra_emb.extra_embedder",
                                   "text_embedder") for i in (1, 2)},
    "unet": {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"},
    "unet-text": {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pipelines")
    return {kind: save_pipeline(place / kind, kind) for kind in NETWORKS}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_denoiser_is_what_diffusers_makes_of_its_folder(folders: dict[str, Path], kind: str) -> None:
    given = inputs(kind)
    model: Any = open_source(str(folders[kind])).model(torch.float32)
    own = network(kind)
    conditions: dict[str, Any] = {name: tensor for name, tensor in given.items() if name not in ("latents", "timestep")}
    if kind == "pixart":
        conditions["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    if kind == "hunyuan":
        conditions |= model.more(given["latents"])
    with torch.no_grad():
        wanted = own(given["latents"], timestep=given["timestep"], **conditions, return_dict=False)[0]
        assert torch.equal(model(**given).logits, wanted)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_layer_is_quantized_or_kept(folders: dict[str, Path], kind: str) -> None:
    model, report = nybble.quantize(folders[kind], data=inputs(kind), weights="int8 channel", settings=SETTINGS)
    layers = {name for name, part in network(kind).named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    done = {row.name.removeprefix("net.") for row in report.layers}
    assert layers - done == KEPT[kind]
    assert done <= layers
    assert bool(model(**inputs(kind)).logits.isfinite().all())


def test_hunyuans_skips_come_by_streams(folders: dict[str, Path]) -> None:
    """Block after block over streams, the last one's output is what it gives in the whole network."""
    model: Any = open_source(str(folders["hunyuan"])).model(torch.float32)
    given, seen = inputs("hunyuan"), list[torch.Tensor]()
    handle = model.net.blocks[-1].register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model(**given)
        handle.remove()
        calls = capture_block_calls(model, given, strict=True)
        tensors: Any = calls[0].start
        for call, block in zip(calls, model.net.blocks, strict=True):
            tensors = call.run(block, tensors)
    assert [dict(call.skips) for call in calls[4:]] == [{"skip": "skip of block 1"}, {"skip": "skip of block 0"}]
    assert torch.equal(tensors[HIDDEN], seen[0])
    assert set(tensors) == {HIDDEN}  # nothing is carried on that nobody reads


def test_the_units_of_a_unet_are_its_residual_and_attention_blocks(folders: dict[str, Path]) -> None:
    model: Any = open_source(str(folders["unet-text"])).model(torch.float32)
    given, adapter = inputs("unet-text"), adapter_for(model)
    (call,) = capture_block_calls(model, given)
    state = BlockState(model.net, "net")
    layers = {n: n for n, m in model.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers = {n: n for n in layers if not adapter.keeps(f"net.{n}")}
    assert call.start is not None
    start = dict(call.start)
    units = find_units(state.module, layers, lambda: call.run(model.net, start), start.values(), "block", adapter.units)
    found = {type(model.net.get_submodule(unit.name)).__name__ for unit in units}
    assert {"ResnetBlock2D", "BasicTransformerBlock"} <= found
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(layers)
    assert not any(unit.name.endswith(("conv1", "conv2", "to_q")) for unit in units)


def test_calibration_follows_the_float_models_own_way(folders: dict[str, Path]) -> None:
    """As diffusers' scheduler goes; every step of each image once; nothing depends on what is quantized."""
    model = open_source(str(folders["dit"])).model(torch.float32)
    config = scheduler_config(folders["dit"])
    sampling = Sampling(steps=5, seed=3)
    made = trajectory_samples(model, scheduler_of(config, ""), 10, sampling)
    own, scheduler = network("dit"), diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(5)
    x, labels = noise_for(model, 2, 3), class_labels(model, 2, 3)["class_labels"]
    wanted = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            wanted.append(x)
            x = scheduler.step(own(x, t.expand(2), labels, return_dict=False)[0], t, x).prev_sample
    for t, latents in zip(scheduler.timesteps, wanted, strict=True):
        mine = made.inputs["latents"][made.inputs["timestep"] == t]
        order = made.inputs["class_labels"][made.inputs["timestep"] == t]
        assert torch.equal(mine[order.argsort()], latents[labels.argsort()])
    assert torch.equal(sample_latents(model, config, 2, sampling), x)
    late = trajectory_samples(model, scheduler_of(config, ""), 4, Sampling(steps=5, seed=3, late=0.8))
    assert set(late.inputs["timestep"].tolist()) == {float(scheduler.timesteps[-1])}


def test_guidance_is_between_both_answers(folders: dict[str, Path]) -> None:
    """One step with guidance g is the step of e0 + g (e - e0), by hand."""
    model = open_source(str(folders["dit"])).model(torch.float32)
    config, noise = scheduler_config(folders["dit"]), noise_for(model, 2, 0)
    labels, null = torch.tensor([1, 2]), torch.tensor([10, 10])
    with torch.no_grad():
        (_, _, x), *_ = steps(model, scheduler_of(config, ""), noise, {"class_labels": labels},
                              Sampling(steps=2, guidance=4.0), {"class_labels": null})  # fmt: skip
        scheduler = scheduler_of(config, "")
        scheduler.set_timesteps(2)
        t = scheduler.timesteps[0]
        seen, free = (model(noise, t.expand(2), class_labels=c).logits for c in (labels, null))
        wanted = scheduler.step(free + 4.0 * (seen - free), t, noise).prev_sample
    assert torch.allclose(x, wanted, atol=1e-5)


def test_a_pipeline_stays_a_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    """Other parts byte for byte; diffusers samples with the packed denoiser what the quantized model in memory does."""
    folder = save_pipeline(tmp_path / "float", "unet", network("unet", num_class_embeds=None))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDIMPipeline"}))
    changes: dict[str, Any] = {"weights": "float4_e2m1fn group=8", "activations": "float8_e4m3fn tensor"}
    memory, _ = nybble.quantize(folder, settings=SETTINGS, **changes)
    nybble.quantize(folder, out=tmp_path / "packed", settings=SETTINGS, **changes)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "packed" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "packed" / "unet").exists()
    pipeline = load_pipeline(tmp_path / "packed")
    pipeline.set_progress_bar_config(disable=True)
    wanted = type(pipeline)(memory.net, pipeline.scheduler)
    wanted.set_progress_bar_config(disable=True)
    made = [
        p(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
        for p in (pipeline, wanted)
    ]
    assert (made[0] == made[1]).all()
    assert made[0].std() > 0


def test_prompts_go_through_the_pipelines_text_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    model = open_source(str(folders["pixart"])).outline(torch.float32)
    found = encoded(["be ce", "de"], read_parts(folders["pixart"]), model)
    assert found["encoder_hidden_states"].shape == (2, 6, 16)
    assert found["encoder_attention_mask"].sum(1).tolist() == [2, 1]
    _, report = nybble.quantize(
        folders["pixart"], "gptq", str(save_prompts(tmp_path / "p.txt")), weights="int4 group=8", settings=SETTINGS
    )
    assert report.manifest["data"]["images"] == 1
    with pytest.raises(UsageError, match="has no text_encoder"):
        nybble.quantize(folders["dit"], "gptq", str(tmp_path / "p.txt"), weights="int4 group=8", settings=SETTINGS)
    with pytest.raises(UsageError, match="reads text"):
        nybble.quantize(folders["pixart"], "gptq", weights="int4 group=8", settings=SETTINGS)


def test_the_judge_tells_how_far_noise_is_from_the_float_models() -> None:
    floats, other, given = Denoised("dit"), Denoised("dit", seed=1), inputs("dit", 20)
    panel = Panel(
        models={"same": floats, "other": other}, reference=floats, metrics=("noise_mse", "noise_sqnr"),
        samples=TrajectorySamples(inputs=given, tokens=1, sha256="", made={}),
    )  # fmt: skip
    found = judge_of("latents").judge(panel, Silent()).metrics
    with torch.no_grad():
        one, two = (model(**given).logits for model in (floats, other))
    assert found["same"] == {"noise_mse": 0.0, "noise_sqnr": float("inf")}
    assert found["other"]["noise_mse"] == pytest.approx(float((one - two).square().mean()), rel=1e-5)


class Denoised(nn.Module):
    """A denoiser as the library holds it."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        self.net = network(kind, seed)

    def forward(self, latents: torch.Tensor, **more: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.net(latents, **more).sample)


def test_bad_folders_and_data_are_one_clear_error(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "p", "dit")
    index = json.loads((folder / "model_index.json").read_text())

    def refused(message: str, error: type[Exception], data: Any = "builtin", **changes: Any) -> None:
        (folder / "model_index.json").write_text(json.dumps({**index, **changes}))
        with pytest.raises(error, match=message):
            nybble.quantize(folder, "gptq", data, weights="int4 group=8", settings=SETTINGS, out=tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["p"]

    given = inputs("dit")
    refused("has no vae, which model_index.json names", ModelError, vae=["diffusers", "AutoencoderKL"])
    refused("names no transformer and no unet", ModelError, transformer=[None, None])
    refused("a part names its package", FileError, vae=["diffusers"])
    refused("latents have 3 channels, and the model takes 4", DataError, {**given, "latents": given["latents"][:, :3]})
    refused("takes latents", DataError, {"latents": given["latents"]})
    refused("NaN", DataError, {**given, "latents": given["latents"] * float("nan")})
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "OtherScheduler"}')
    refused("names the scheduler 'OtherScheduler'", ModelError)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    refused("has no scheduler/scheduler_config.json", FileError)
    (folder / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    refused("no denoiser that can be quantized", ModelError)
