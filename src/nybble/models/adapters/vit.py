"""Vision transformers with a norm before attention and MLP: ViT and DeiT."""

from __future__ import annotations

from nybble.models.adapter import Adapter, LinearFold, NormFold, QueryKeyFold

PART = Adapter(
    name="vit",
    model_types=("vit", "deit"),
    blocks="{base}layers",
    embeddings=("{base}embeddings.patch_embeddings.projection",),
    final_norm="{base}layernorm",
    head="classifier",
    reads="images",
    norm_folds=(
        NormFold(norm="layernorm_before", readers=("attention.q_proj", "attention.k_proj", "attention.v_proj")),
        NormFold(norm="layernorm_after", readers=("mlp.fc1",)),
    ),
    linear_folds=(LinearFold(first="attention.v_proj", second="attention.o_proj", heads=True),),
    query_key_folds=(QueryKeyFold(query="attention.q_proj", key="attention.k_proj"),),
    limits=("mlp.fc1 -> mlp.fc2 can't be folded: GELU between them is not homogeneous",),
)
