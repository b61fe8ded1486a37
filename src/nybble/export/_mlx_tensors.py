"""The bytes of MLX's modes, from a tensor's own: codes keep their value, zero points go into biases, or are refused.

MLX calculates ``scale * code + bias``. Real offsets (``minmax(offset=true)``) are biases as they are. A zero point z,
and the sign of integers, become ``bias = scale * (low - z)``: exact for a symmetric format, whose z is a power of two;
for others the product may have more digits than the model's dtype, and then scales and biases are float32, in which MLX
multiplies as well. What float32 can't give bit for bit is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nybble.core.tensorfile import Planned, safetensors_name
from nybble.export._ct_tensors import moved
from nybble.export._mlx_form import Form, is_power_of_two, nearest, repeated
from nybble.export._source import Layer, Source
from nybble.models.sources.layouts._ct_args import CannotError, in_words
from nybble.models.sources.layouts._pieces import flipped
from nybble.packing import get_layout
from nybble.qtensor import Inverse, dense
from nybble.qtensor._rows import take_rows
from nybble.qtensor.block import BlockQTensor

LARGEST = 6.0 * 448.0
"""MLX's global scale is so many times what NVFP4's scales are multiplied with."""
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Piece:
    """Rows of a layer's matrix: ``prefix`` of its tensors, and which rows (None: all, in order)."""

    prefix: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Placed:
    """A module of the folder.

    Attributes:
        source: where it is read. path: its name in MLX. layer: what it is of. form: how it is packed.
        pieces: the matrices that it is made of: one, or one for each expert.
        stacked: whether it has a dimension for experts in front.
    """

    source: Source
    path: str
    layer: Layer
    form: Form
    pieces: tuple[Piece, ...]
    stacked: bool

    def read(self, piece: Piece) -> BlockQTensor:
        """A matrix with its values."""
        found = self.source.weight(self.layer, piece.prefix)
        assert isinstance(found, BlockQTensor)
        return found if piece.rows is None else take_rows(found, piece.rows)

    def scales(self, piece: Piece) -> BlockQTensor:
        """A matrix whose codes needn't be read."""
        found = self.source.scales(self.layer, piece.prefix)
        assert isinstance(found, BlockQTensor)
        return found if piece.rows is None else take_rows(found, piece.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of a matrix."""
        rows, columns = self.layer.weights[self.pieces[0].prefix].shape
        taken = self.pieces[0].rows
        return (rows if taken is None else len(taken)), columns

    @property
    def said(self) -> dict[str, int | str | bool]:
        """As config.json says it."""
        return self.form.said | ({"global_scale": True} if self.stacked and self.form.outer else {})

    def tensors(self) -> dict[str, Planned]:
        """What is written, by full name."""
        (rows, columns), form = self.shape, self.form
        words = columns * form.bits // 32
        found = {"weight": self._codes((rows, words))}
        if form.mode == "affine":
            dtype = self.dtype
            for name, part in (("scales", 0), ("biases", 1)):
                side = _Side(self, part, dtype)
                found[name] = self._made(dtype, (rows, columns // form.group), self.scales, side)
        else:
            found["scales"] = self._made(torch.uint8, (rows, columns // form.group), self.scales, self._bytes)
            if self.stacked and form.outer:
                made = Planned(dtype="F32", shape=(len(self.pieces),), bytes_from=self._global_scales)
                found["global_scale"] = made
        return {f"{self.path}.{name}": plan for name, plan in found.items()}

    def _made(
        self,
        dtype: torch.dtype,
        shape: tuple[int, int],
        read: Callable[[Piece], BlockQTensor],
        make: Callable[[BlockQTensor], Tensor],
    ) -> Planned:
        def whole() -> Tensor:
            parts = [make(read(piece)) for piece in self.pieces]
            return torch.stack(parts) if self.stacked else parts[0]

        name = str(safetensors_name(dtype))
        return Planned(dtype=name, shape=(len(self.pieces), *shape) if self.stacked else shape, bytes_from=whole)

    def _codes(self, shape: tuple[int, int]) -> Planned:
        """The bytes of the file where they are MLX's."""
        empty = self.layer.weights[self.pieces[0].prefix]
        assert isinstance(empty, BlockQTensor)
        plain = self.form.ladder is None or self.form.ladder.rungs == tuple(range(1 << empty.format.bits))
        if plain and empty.layout == "dense" and not self.stacked and self.pieces[0].rows is None:
            return replace(self.source.copied(f"{self.pieces[0].prefix}.codes"), dtype="U32", shape=shape)
        return self._made(torch.uint32, shape, self.read, lambda tensor: packed_words(tensor, self.form).view(shape))

    def _bytes(self, tensor: BlockQTensor) -> Tensor:
        scale = _nested(tensor)
        codes = scale.codes
        if self.form.outer and not self.stacked:
            codes = moved(codes.view(_E4M3), _outer(scale)).view(torch.uint8)
        return repeated(codes, self.form, self.shape)

    def _global_scales(self) -> Tensor:
        values = [global_scale(_outer(_nested(self.scales(piece)))) for piece in self.pieces]
        return torch.tensor(values, dtype=torch.float32)

    # ------------------------------------------------------------------------------------------------ what is possible
    @cached_property
    def dtype(self) -> torch.dtype:
        """Of scales and biases: the model's, or float32 where that would round them.

        Raises:
            CannotError: float32 would, too.
        """
        wanted = self.source.dtype
        for piece in self.pieces:
            tensor = self.scales(piece)
            if not exact_in(tensor, self.form, wanted):
                wanted = torch.float32
                if not exact_in(tensor, self.form, wanted):
                    why = "its biases, -zero point * scale, have more digits than float32"
                    if tensor.params.zero_point is None and tensor.params.offset is None:
                        why = "its scales have more digits than MLX's products keep"
                    raise CannotError(in_words(tensor), f"{nearest(tensor)} scale_format=bfloat16", why)
        return wanted

    def check(self) -> None:
        """Look at scales and zero points.

        Raises:
            CannotError: they can't be written without a change of some value.
        """
        if self.form.mode == "affine":
            _ = self.dtype
        elif self.form.outer:
            for tensor in map(self.scales, self.pieces):
                self._check_outer(_nested(tensor), in_words(tensor))

    def _check_outer(self, scale: BlockQTensor, came: str) -> None:
        from nybble.core.errors import FileError

        outer = scale.params.scale
        if isinstance(outer, Inverse) and not is_power_of_two(_value(outer.divisor)):
            raise CannotError(came, "nvfp4 with --target mlx", "its scales are divided by a number, MLX multiplies")
        value = _outer(scale)
        if self.stacked:
            if global_scale(value) is None:
                why = f"no global scale of MLX's gives {value!r}"
                raise CannotError(came, "nvfp4 with --target mlx", why)
            return
        try:
            moved(scale.codes.view(_E4M3), value if is_power_of_two(value) else float("nan"))
        except FileError as error:
            why = "MLX's layers have no scale over NVFP4's scales, but for experts, and these don't take it up"
            raise CannotError(came, "mxfp4, or nvfp4 with --target mlx", why) from error


@dataclass(frozen=True)
class _Side:
    """Scales (0) or biases (1) of a matrix, in a dtype."""

    placed: Placed
    part: int
    dtype: torch.dtype

    def __call__(self, tensor: BlockQTensor) -> Tensor:
        form = self.placed.form
        return repeated(affine(tensor, form)[self.part], form, tensor.shape[:2]).to(self.dtype)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- affine
def affine(tensor: BlockQTensor, form: Form) -> tuple[Tensor, Tensor]:
    """Scale and bias of each block, float64; both exact, or the bias NaN.

    Args:
        tensor: with its values.
        form: of it; its mode is affine.
    """
    ladder, params = form.ladder, tensor.params
    assert ladder is not None
    count = _blocks(tensor)
    scale = torch.ones(count, dtype=torch.float64)
    if params.scale is not None:
        assert not isinstance(params.scale, Inverse)
        scale = dense(params.scale).double().reshape(-1)  # type: ignore[arg-type]
    low = torch.full_like(scale, ladder.low)
    if params.zero_point is not None:
        low = low - dense(params.zero_point).double().reshape(-1)
    bias = scale * low
    if params.offset is not None:
        offset = dense(params.offset).double().reshape(-1).expand(count)
        whole = bias + offset
        bias = torch.where((whole - offset == bias) & (whole - bias == offset), whole, torch.nan)
    return scale * ladder.step, bias


def exact_in(tensor: BlockQTensor, form: Form, dtype: torch.dtype) -> bool:
    """Whether scales and biases in a dtype give every value bit for bit, calculated in float32.

    ``scale * code`` has to be exact where a bias stands for more than an offset: then the sum is the one number that
    both sides round.
    """
    ladder, params = form.ladder, tensor.params
    assert ladder is not None
    scale, bias = affine(tensor, form)
    if any(not torch.equal(part.to(dtype).double(), part) for part in (scale, bias)):
        return False
    if ladder.low == 0 and ladder.step == 1 and params.zero_point is None:
        return True
    spare = form.bits + (params.offset is not None)  # digits that products need
    return not bool((scale.float().view(torch.int32) & ((1 << spare) - 1)).any())


def _blocks(tensor: BlockQTensor) -> int:
    shape = tensor.granularity.scale_shape(tensor.shape)
    return int(torch.Size(shape).numel())


def packed_words(tensor: BlockQTensor, form: Form) -> Tensor:
    """uint32: codes as MLX counts them, from the lowest value up, a little-endian stream."""
    bits, ladder = tensor.format.bits, form.ladder
    if ladder is None:
        rungs: Sequence[int] = range(1 << bits)
    else:
        rungs = ladder.rungs
    if bits == form.bits and tensor.layout == "dense":
        if tuple(rungs) == tuple(range(1 << bits)):
            return tensor.codes.clone().view(torch.uint32)
        if all(rung == code ^ (1 << (bits - 1)) for code, rung in enumerate(rungs)):
            return flipped(tensor.codes, bits).view(torch.uint32)
    table = torch.tensor(list(rungs), dtype=torch.uint8)
    codes = table[tensor.unpacked().reshape(-1).long()]
    found: Tensor = get_layout("dense").pack(codes, form.bits)
    return found.view(torch.uint32)


# ---------------------------------------------------------------------------------------------------------------- NVFP4
def _nested(tensor: BlockQTensor) -> BlockQTensor:
    scale = tensor.params.scale
    assert isinstance(scale, BlockQTensor)
    return scale


def _value(tensor: Tensor) -> float:
    return tensor.float().reshape(-1)[0].item()


def _outer(scale: BlockQTensor) -> float:
    """What NVFP4's scales are multiplied with."""
    outer = scale.params.scale
    if isinstance(outer, Inverse):
        return 1 / _value(outer.divisor)
    assert isinstance(outer, Tensor)
    return _value(outer)


def global_scale(outer: float) -> float | None:
    """The float32 that MLX, which divides it by 2688, makes ``outer`` of; None where there is none.

    >>> global_scale(2.0**-12)
    0.65625
    """
    wanted = torch.tensor(outer, dtype=torch.float32)
    for candidate in _around(wanted * LARGEST):
        if torch.equal(candidate / LARGEST, wanted):
            return candidate.item()
    return None


def _around(value: Tensor) -> Iterator[Tensor]:
    infinite = torch.tensor(torch.inf, dtype=torch.float32)
    yield value
    yield torch.nextafter(value, infinite)
    yield torch.nextafter(value, -infinite)
