"""``transform_config`` of compressed-tensors: rotations of inputs that runtimes compute, and their tensors.

A scheme's matrix is kept times sqrt(n), once for all modules that it is for, under the first of them. The library
itself makes Hadamard matrices of powers of two anew; all others are read from the file.
Source: compressed-tensors 0.20 (``transform/``); tests open what is written with it, and what llm-compressor writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.core.tensorfile import Planned
from nybble.export import Refusal
from nybble.export._fused import fused_groups
from nybble.models.build.config_file import read_json
from nybble.models.sources.folder import weight_files

if TYPE_CHECKING:
    from nybble.export._source import Source
    from nybble.nn.rotation import BlockRotation

KEY = "transform_config"


@dataclass(frozen=True, kw_only=True)
class Rotations:
    """Modules whose inputs are rotated alike.

    Attributes:
        name: of the scheme. modules: names, in the model's order. rotation: what is done. whole: in a single block.
    """

    name: str
    modules: tuple[str, ...]
    rotation: BlockRotation
    whole: bool

    @property
    def plain(self) -> bool:
        """Whether the library makes the matrix itself."""
        found = self.rotation
        return found.matrix is None and found.signs is None and found.block & (found.block - 1) == 0

    def scheme(self) -> dict[str, Any]:
        """A TransformScheme, as it is dumped."""
        sides = (("input", False), ("weight_input", True))
        apply = [{"targets": list(self.modules), "location": at, "inverse": i, "ignore": []} for at, i in sides]
        return {
            "type": "hadamard" if self.plain else "random-hadamard",
            "apply": apply,
            "randomize": False,
            "requires_grad": False,
            "head_dim": None if self.whole else self.rotation.block,
            "precision": "torch.float32",
        }

    def tensors(self) -> dict[str, Planned]:
        """The matrix, float32 [n, n], by its name."""
        size = self.rotation.block
        plan = Planned(dtype="F32", shape=(size, size), bytes_from=partial(_stored, self.rotation))
        return {f"{self.modules[0]}.{self.name}_input.weight": plan}


def _stored(rotation: BlockRotation) -> Tensor:
    found: Tensor = rotation.basis() * float(rotation.block) ** 0.5
    return found.round() if rotation.matrix is None else found  # of a Hadamard matrix 1 and -1


def rotations(source: Source) -> list[Rotations]:
    """The schemes of a model."""
    if ("rotations", "") not in source.known:
        source.known["rotations", ""] = _rotations(source)
    found: list[Rotations] = source.known["rotations", ""]
    return found


def _rotations(source: Source) -> list[Rotations]:
    alike: dict[tuple[Any, ...], list[str]] = {}
    made: dict[tuple[Any, ...], tuple[BlockRotation, bool]] = {}
    for name, layer in source.layers.items():
        rotation = source.rotation(layer)
        if rotation is None:
            continue
        whole = next(iter(layer.weights.values())).shape[1] == rotation.block if layer.weights else False
        key = (whole, rotation.block, *(str(t.tolist()) for t in (rotation.signs, rotation.matrix) if t is not None))
        alike.setdefault(key, []).append(name)
        made[key] = rotation, whole
    return [
        Rotations(name=f"rotation_{number}", modules=tuple(names), rotation=made[key][0], whole=made[key][1])
        for number, (key, names) in enumerate(alike.items())
    ]


def transform_config(source: Source) -> dict[str, Any]:
    """As the library's own ``update_config`` writes it; empty where nothing is rotated."""
    found = rotations(source)
    return {"config_groups": {each.name: each.scheme() for each in found}} if found else {}


def unlike_siblings(source: Source) -> list[Refusal]:
    """Layers that runtimes join, and whose one input is rotated differently."""
    named = {module: each.name for each in rotations(source) for module in each.modules}
    why = "runtimes join them into one layer, which has one input"
    came, nearest = "different online rotations", "one rotation for all of them, or none"
    groups = [group for group in fused_groups(source.layers) if len({named.get(name) for name in group}) > 1]
    return [Refusal(layers=group, came=came, nearest=nearest, why=why) for group in groups]


@torch.no_grad()
def rotate_online(model: Any, folder: Path) -> None:
    """Let the library put a folder's online rotations into a model that transformers has opened without them.

    What is said of weights is done already: they are in the files as they come out of it.
    """
    stated = (read_json(folder / "config.json").get("quantization_config") or {}).get(KEY)
    if not stated:
        return
    from compressed_tensors.transform import TransformConfig, TransformFactory
    from compressed_tensors.transform.factory.base import TransformBase
    from safetensors import safe_open

    config: Any = TransformConfig.model_validate(stated)
    for name, scheme in config.config_groups.items():
        online = [args for args in scheme.apply if args.is_online()]
        factory: Any = TransformFactory.from_scheme(scheme.model_copy(update={"apply": online}), name=name)
        factory.apply_to_model(model, use_tqdm=False)
    files = weight_files(folder)
    for name, module in model.named_modules():
        place = files.get(f"{name}.weight")
        if isinstance(module, TransformBase) and place is not None:
            with safe_open(place[0], framework="pt", device="cpu") as file:
                module.weight.copy_(file.get_tensor(f"{name}.weight"))


def matrix_names(stated: Any) -> Sequence[str]:
    """How the names of a config's matrices end."""
    groups = (stated or {}).get("config_groups") or {}
    return [f".{name}_{args['location']}.weight" for name, each in groups.items() for args in each["apply"]]
