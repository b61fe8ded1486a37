"""compressed-tensors' own decoder on every written module; and whether transformers can open the whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.core.guard import reading
from nybble.export._ct_layers import Placed
from nybble.export._ct_library import library, quietly
from nybble.export._source import Source
from nybble.models.build.config_file import read_json
from nybble.models.sources.folder import weight_files


def how_opened(source: Source, places: Sequence[Placed]) -> tuple[str, bool]:
    """Why transformers can't open these modules, if it can't; and whether it has to dequantize them while it loads.

    Of fused experts it knows no packed form, and of their zero points nothing. Packed zero points it expects in
    another shape, where it doesn't dequantize (compressed-tensors 0.20, transformers 5.23).
    """
    experts = [place for place in places if not place.at]
    dense = [place for place in places if place.at]
    asymmetric = [p for p in places if p.scheme["format"] == "pack-quantized" and not p.scheme["weights"]["symmetric"]]
    tables = [place for place in places if place.embedding]  # whose weight transformers looks at while it loads
    dequantize = bool(experts or asymmetric or tables)
    if any(place in experts for place in asymmetric):
        return "transformers opens no fused experts with zero points", True
    if any(_unread(place) for place in experts):
        return "transformers opens no fused experts in NVFP4 or MXFP8, nor float8 ones with scales of blocks", True
    kinds = [{str(place.scheme) for place in some} for some in (experts, dense)]
    if dequantize and any(len(kind) > 1 for kind in kinds):
        return "transformers opens no several schemes in one model with zero points, tables or fused experts", True
    if experts and any("input_activations" in place.scheme for place in dense):
        return "transformers rounds no inputs in a model of fused experts", True
    return "", dequantize


def _unread(place: Placed) -> bool:
    """Whether transformers multiplies an expert of this scheme with something else than its scales."""
    weights, form = place.scheme.get("weights") or {}, place.scheme["format"]
    wide = weights.get("type") == "float" and weights.get("num_bits") == 8
    blocks = weights.get("strategy") not in ("tensor", "channel")
    return form.startswith("nvfp4") or (wide and (blocks or form.startswith("mx")))


@torch.no_grad()
def compare_decoded(folder: Path, source: Source, places: Sequence[Placed]) -> tuple[int, str]:
    """Compare every weight, decoded by the library from the files and the config that were written.

    Returns:
        how many; the dtype in which they are equal.

    Raises:
        FileError: one differs, or the library can't read it.
    """
    with quietly():
        found = library()
        config = read_json(folder / "config.json")["quantization_config"]
        made = found.quantization.QuantizationConfig.model_validate(config)
        schemes = {target: scheme for scheme in made.config_groups.values() for target in scheme.targets}
    exact_in, count = torch.float32, 0
    with _Files(folder) as files:
        for place in places:
            if place.matrix is None:
                continue
            count += 1
            with reading(f"{place.name} in {folder}"), quietly():
                theirs = _decoded(found, files.of(place.name), _scheme_for(place, schemes, found))
            ours = place.matrix.read().dequantize()
            wanted = (torch.float32, source.dtype, torch.bfloat16)
            equal = next((d for d in wanted if torch.equal(ours.to(d).float(), theirs.float())), None)
            if equal is None:
                worst = (ours - theirs.float()).abs().max().item()
                raise FileError(f"{folder}: {place.name} isn't what was written: values differ by up to {worst:.3g}.")
            exact_in = exact_in if equal == torch.float32 else equal
    return count, str(exact_in).removeprefix("torch.")


def _decoded(found: Any, tensors: dict[str, Tensor], scheme: Any) -> Tensor:
    compressor = found.compressors.BaseCompressor.get_value_from_registry(scheme.format)
    decoded: Tensor = compressor.decompress(tensors, scheme)["weight"]
    return decoded


def _scheme_for(place: Placed, schemes: dict[str, Any], found: Any) -> Any:
    """The group of the written config whose target names this module, as the library matches names."""
    from compressed_tensors.utils.match import match_name

    cls = "Embedding" if place.embedding else "Linear"
    named = [target for target in schemes if target != cls and match_name(place.name, target)]
    if place.at:
        named += [target for target in schemes if target == place.at]
    return schemes[(named or [cls])[0]]


class _Files:
    """The tensors of a folder by module."""

    def __init__(self, folder: Path) -> None:
        self._where = {name: path for name, (path, _) in weight_files(folder).items()}
        self._opened: dict[Path, Any] = {}
        self._stack = ExitStack()

    def of(self, module: str) -> dict[str, Tensor]:
        """Tensors right below a module, by their last name."""
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        for leaf in (
            "weight",
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
            "weight_global_scale",
        ):
            path = self._where.get(f"{module}.{leaf}")
            if path is None:
                continue
            if path not in self._opened:
                self._opened[path] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            found[leaf] = self._opened[path].get_tensor(f"{module}.{leaf}")
        return found

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.clear()
        self._stack.close()
