"""Tiny pipelines of diffusers with random weights, as diffusers itself saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_text, tiny_tokenizer
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="models of diffusers need it: pip install 'nybble[diffusion]'")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
    "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("DiTTransformer2DModel", {
        **HEADS, "in_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}),
    "pixart": ("PixArtTransformer2DModel", {
        **HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 32,
        "caption_channels": 16}),
    "hunyuan": ("HunyuanDiT2DModel", {
        **HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "num_layers": 6,
        "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "pooled_projection_dim": 8, "text_len": 3,
        "text_len_t5": 4}),
    "unet": ("UNet2DModel", {
        **UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "num_class_embeds": 10,
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}),
    "unet-text": ("UNet2DConditionModel", {
        **UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}),
}  # fmt: skip
PIPELINES = {
    "dit": "DiTPipeline", "pixart": "PixArtAlphaPipeline", "hunyuan": "HunyuanDiTPipeline", "unet": "DDPMPipeline",
    "unet-text": "StableDiffusionPipeline",
}  # fmt: skip


def network(kind: str, seed: int = 0, **changes: Any) -> Any:
    """One of diffusers' denoisers, float32, in eval mode; what diffusers begins at zero is drawn, too."""
    name, arguments = NETWORKS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = getattr(diffusers, name)(**{**arguments, **changes})
        for parameter in net.parameters():
            if not bool(parameter.count_nonzero()):
                nn.init.normal_(parameter, std=0.05)
    return net.eval()


def inputs(kind: str, samples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """What a denoiser is called with."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, generator=draw)

    found = {"latents": normal(4, 8, 8), "timestep": torch.randint(1000, (samples,), generator=draw).float()}
    if kind in ("dit", "unet"):
        found["class_labels"] = torch.arange(samples) % 10
    if kind in ("pixart", "unet-text"):
        found["encoder_hidden_states"] = normal(5, 16)
    if kind == "hunyuan":
        mask = torch.ones(samples, 4, dtype=torch.int64)
        found |= {
            "encoder_hidden_states": normal(3, 16), "text_embedding_mask": mask[:, :3],
            "encoder_hidden_states_t5": normal(4, 16), "text_embedding_mask_t5": mask,
            "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]]).repeat(samples, 1),
            "style": torch.zeros(samples, dtype=torch.int64),
        }  # fmt: skip
    return found


def save_pipeline(folder: Path, kind: str, net: Any = None) -> Path:
    """A pipeline's folder; those of text have a text encoder and a tokenizer."""
    part = "unet" if kind.startswith("unet") else "transformer"
    net = network(kind) if net is None else net
    net.save_pretrained(folder / part)
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    index = {part: ["diffusers", type(net).__name__], "scheduler": ["diffusers", "DDIMScheduler"]}
    if kind in ("pixart", "unet-text"):
        _save_text_parts(folder)
        index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "LlamaTokenizer"]}
    index = {"_class_name": PIPELINES[kind], "_diffusers_version": diffusers.__version__, **index}  # type: ignore[dict-item]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save_text_parts(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.model_max_length = "<unk>", 6
    tokenizer.save_pretrained(folder / "tokenizer")
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder: Any = T5EncoderModel(config).eval()  # type: ignore[no-untyped-call]
        encoder.save_pretrained(folder / "text_encoder")


def save_prompts(path: Path) -> Path:
    """Some prompts, one a line."""
    words = save_text(path).read_text().split()
    path.write_text("\n".join(" ".join(words[at : at + 4]) for at in range(0, 20, 4)))
    return path
