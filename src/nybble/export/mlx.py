"""MLX folders, which mlx-lm runs on Apple's machines (and mlx on any).

Every code is written as it is, and mlx's own dequantizer gives nybble's values in float32. MLX's integers are
``scale * code + bias``: symmetric ones, and those over a real offset, are written exactly in the model's dtype;
integer zero points in float32 where their bias needs it (:mod:`nybble.export._mlx_tensors`).
Source: mlx 0.32 (``mx.quantize``), mlx-lm 0.32 (``utils.py``).
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from nybble.core.errors import ModelError
from nybble.core.files import atomic_write_json
from nybble.core.tensorfile import stream_tensorfiles
from nybble.export import ExportTarget, Facts, Refusal, Verified
from nybble.export._folder import SHARD_BYTES, write_beside
from nybble.export._mlx_constrain import constrained
from nybble.export._mlx_layers import as_read, placed, quantization
from nybble.export._mlx_takes import TAKES, TRIED, WINDOWLESS
from nybble.export._mlx_tensors import Placed
from nybble.export._mlx_verify import NEEDS, compare_logits, compare_weights, library
from nybble.export._names import as_stored
from nybble.export._source import Source
from nybble.models.sources.layouts._ct_args import CannotError
from nybble.scheme import Scheme

_CARD = """This folder is in the format of [MLX](https://github.com/ml-explore/mlx):
`mlx_lm.generate --model . --prompt "..."` runs it. nybble is not needed."""


class Mlx(ExportTarget):
    """Safetensors with MLX's packed words."""

    summary = "safetensors for MLX (mlx-lm)"
    takes = TAKES

    def __init__(self, option: str = "") -> None:
        super().__init__(option)
        self._known: tuple[Source, list[Placed]] | None = None

    def _places(self, source: Source) -> list[Placed]:
        """The modules of the folder; what their scales allow is looked up once."""
        if self._known is None or self._known[0] is not source:
            model = source.skeleton()
            self._known = source, [p for layer in source.layers.values() for p in placed(source, model, layer)]
        return self._known[1]

    def require(self, check: bool) -> None:  # noqa: D102
        if check:
            library()

    def constrain(self, scheme: Scheme, facts: Facts) -> Scheme:  # noqa: D102
        return constrained(scheme, facts)

    def check(self, source: Source) -> list[Refusal]:  # noqa: D102
        found: dict[tuple[str, str, str], list[str]] = {}
        model, places = source.skeleton(), list[Placed]()
        for name, layer in source.layers.items():
            try:
                for place in placed(source, model, layer):
                    place.check()
                    places.append(place)
            except CannotError as error:
                found.setdefault((error.came, error.nearest, error.why), []).append(name)
        self._known = None if found else (source, places)
        return [
            Refusal(layers=tuple(names), came=came, nearest=nearest, why=why)
            for (came, nearest, why), names in found.items()
        ]

    def notes(self, source: Source) -> list[str]:  # noqa: D102
        lines = []
        wide = [p.path for p in self._places(source) if p.form.mode == "affine" and p.dtype != source.dtype]
        if wide:
            more = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
            dtype = str(source.dtype).removeprefix("torch.")
            lines.append(
                f"scales and biases of {wide[0]}{more} are float32, since {dtype} would round them; mlx calculates "
                "in float32 then (not if quantized with --target mlx)"
            )
        if source.kv is not None:
            lines.append("the KV cache is mlx-lm's own (--kv-bits, --kv-group-size)")
        family = str(source.config.get("model_type"))
        if family not in TRIED:
            lines.append(f"no {family} was tried with mlx-lm; --check runs it")
        window = source.config.get("sliding_window")
        if family in WINDOWLESS and window:
            lines.append(f"mlx-lm gives {family} no sliding window: it says something else behind {window} tokens")
        return lines

    def write(self, source: Source, folder: Path) -> None:  # noqa: D102
        model, places = source.skeleton(), self._places(source)
        tensors = as_stored(model, {name: source.copied(name) for name in source.floats}, source.tensor)
        for place in places:
            made = place.tensors()
            twice = sorted(made.keys() & tensors.keys())
            if twice:
                raise ModelError(f"{source.place} holds {twice[0]} in float, and it is packed too.")
            tensors |= made
        stream_tensorfiles(tensors, folder / "model.safetensors", {"format": "mlx"}, SHARD_BYTES)
        said = quantization(places)
        config = as_read(source.config, model)
        if said:  # twice, as mlx-lm has it
            config |= {"quantization": said, "quantization_config": said}
        atomic_write_json(folder / "config.json", config)
        write_beside(source, folder, _CARD, library="mlx")

    def verify(self, folder: Path, source: Source) -> Verified:
        """By mlx's dequantizer; the logits by mlx-lm, both sides in float32."""
        library()
        places = self._places(source)
        count = compare_weights(folder, places)
        cosine, largest, why = compare_logits(folder, source)
        modes = {(place.form.mode, place.form.bits) for place in places}
        return Verified(
            opened_with={name: version(name) for name in NEEDS},
            weights=count,
            exact_in="float32",
            cosine=cosine,
            largest=largest,
            uncalled=why,
            runtimes=tuple(row for row in TAKES if any(mode == row.form for mode, _ in modes)),
        )


PART = Mlx
