"""Images for vision models: IDX files (MNIST's format), arrays, folders of pictures; labels where there are any.

=======================  =========================================================================================
SRC                      images and labels
=======================  =========================================================================================
``x-images-idx3-ubyte``  also ``.gz``; labels from ``x-labels-idx1-ubyte`` beside it, if it is there
``x.npy``                uint8 [N, H, W] or [N, H, W, channels]; no labels
``x.npz``                ``images`` as above, and ``labels`` [N], if it is there; nothing pickled is read
a folder                 pictures (Pillow reads them); folders in it are classes, in the order of their names; of one
                         that ``nybble synthesise`` wrote, its ``images.npz``
=======================  =========================================================================================
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import DataError, FileError, UsageError
from nybble.data.samples import patches
from nybble.data.tokens import check_count, pick

SYNTHESISED = "images.npz"
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


class Pictures(Protocol):
    """Images by number: uint8 [height, width] or [height, width, channels]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """What a source holds, as it is.

    Attributes:
        images: of which files are opened when they are asked for.
        labels: integers [images], or None. classes: what the labels count, where folders name it.
        note: what they are.
    """

    images: Pictures
    labels: np.ndarray | None
    classes: tuple[str, ...] = ()
    note: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSamples:
    """Images as a model takes them, for calibration or evaluation.

    Attributes:
        pixel_values: float32 [samples, channels, height, width], normalised.
        labels: int64 [samples], or None.
        sha256: of pixel_values, as little-endian float32.
        available: how many images the source has.
        source: SRC. note: what they are.
    """

    pixel_values: Tensor
    labels: Tensor | None
    sha256: str
    available: int
    source: str
    note: str

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with."""
        return {"pixel_values": self.pixel_values}

    @property
    def tokens(self) -> int:
        """About how many vectors a layer sees; an estimate for sizes only."""
        return patches(self.pixel_values)

    def manifest(self) -> dict[str, Any]:
        """What a manifest or a report states beside every number from these images."""
        samples, channels, height, width = self.pixel_values.shape
        return {
            "source": self.source,
            "note": self.note,
            "pixels_sha256": self.sha256,
            "samples": samples,
            "size": [channels, height, width],
        }


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a model wants its images: size, channels, and the mean and deviation of its training data (values 0 .. 1)."""

    height: int
    width: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)


def preparation_for(config: Any, preprocessor: Mapping[str, Any]) -> Preparation:
    """From a model's config and its ``preprocessor_config.json`` (empty where it has none).

    Raises:
        DataError: the config doesn't say how large images are, or the preprocessor's numbers make no sense.
    """
    own = getattr(config, "pretrained_cfg", None) or {}  # timm's
    size = getattr(config, "image_size", None) or (own.get("input_size") or [])[1:] or _size(preprocessor)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise DataError(
            "neither the model's config nor a preprocessor_config.json says how large its images are (image_size; "
            "crop_size or size)."
        )
    channels = int(getattr(config, "num_channels", 3))
    stated = {"image_mean": own.get("mean"), "image_std": own.get("std"), **preprocessor}
    mean, std = (tuple(stated.get(key) or (0.5,)) for key in ("image_mean", "image_std"))
    numbers = all(isinstance(x, int | float) for x in (*mean, *std)) and all(x > 0 for x in std)
    if not numbers or any(len(values) not in (1, channels) for values in (mean, std)):
        raise DataError(
            f"preprocessor_config.json: image_mean {mean} and image_std {std} don't fit {channels} channels."
        )
    return Preparation(height=int(size[0]), width=int(size[1]), channels=channels, mean=mean, std=std)


def _size(preprocessor: Mapping[str, Any]) -> object:
    """Height and width, or one number for both, from a preprocessor's ``crop_size`` or ``size``; else None."""
    found = preprocessor.get("crop_size") or preprocessor.get("size")
    if not isinstance(found, Mapping):
        return found
    return (found["height"], found["width"]) if {"height", "width"} <= set(found) else found.get("shortest_edge")


def image_samples(
    src: str,
    preparation: Preparation,
    *,
    samples: int | None,
    seed: int | None = None,
    fewer: bool = False,
    classes: Sequence[str] = (),
) -> ImageSamples:
    """Read images and bring them into a model's form: bilinear to its size, grey to its channels, normalised.

    Args:
        src: see the module.
        preparation: what the model wants.
        samples: how many; None takes all, in order.
        seed: None picks evenly spread ones, in order; a number picks at random without replacement.
        fewer: take what there is where that is fewer than ``samples``, instead of raising.
        classes: the model's, by number, for :func:`numbered`.

    Raises:
        UsageError: no such source, or Pillow is missing. FileError: it can't be read. DataError: it holds no images,
            or too few.
    """
    check_count(samples)
    found = numbered(read_images(src), classes, src)
    images, labels, available = found.images, found.labels, len(found.images)
    wanted = available if samples is None or (fewer and samples > available) else samples
    if wanted > available or not available:
        raise DataError(f"data {src!r} has {available} images, fewer than the {max(1, wanted)} asked for.")
    chosen = pick(available, wanted, seed).tolist()
    pixels = torch.stack([prepared(images[i], preparation) for i in chosen])
    return ImageSamples(
        pixel_values=pixels,
        labels=None if labels is None else torch.from_numpy(labels[chosen].astype(np.int64)),
        sha256=hashlib.sha256(pixels.numpy().astype("<f4", copy=False).tobytes()).hexdigest(),
        available=available,
        source=src,
        note=found.note,
    )


def numbered(found: ImageSet, classes: Sequence[str], src: str) -> ImageSet:
    """With the model's numbers for labels, where folders bear the names of its ``classes``; else in their own order.

    Raises:
        DataError: some of the folders bear such names, and others don't.
    """
    strange = [name for name in found.classes if name not in classes]
    if found.labels is None or not found.classes or len(strange) == len(found.classes):
        return found
    if strange:
        raise DataError(
            f"data {src!r} has a folder {strange[0]!r}, which is no class of the model, beside others that are "
            f"({next(name for name in found.classes if name in classes)!r}). Rename it, or take it away."
        )
    numbers = np.array([classes.index(name) for name in found.classes])
    return replace(found, labels=numbers[found.labels])


def prepared(image: np.ndarray, preparation: Preparation) -> Tensor:
    """uint8 [H, W] or [H, W, channels] -> float32 [channels, height, width]; resized pixels are bytes again."""
    x = torch.from_numpy(np.array(image))
    x = x[None] if x.dim() == 2 else x.permute(2, 0, 1)[:3]
    size = (preparation.height, preparation.width)
    if tuple(x.shape[1:]) != size:
        x = torch.nn.functional.interpolate(x[None], size=size, mode="bilinear", antialias=True)[0]
    x = x.float() / 255
    if x.shape[0] != preparation.channels:
        x = x.mean(0, keepdim=True).expand(preparation.channels, -1, -1)
    mean, std = (
        torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (preparation.mean, preparation.std)
    )
    return (x - mean) / std


def read_images(src: str) -> ImageSet:
    """What a SRC holds.

    Raises:
        UsageError, FileError, DataError: as :func:`image_samples`.
    """
    path = Path(src).expanduser()
    if (path / SYNTHESISED).is_file():
        path = path / SYNTHESISED
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise FileError(f"data {src!r} does not exist. Give an IDX file, .npy, .npz, or a folder of pictures.")
    try:
        if path.suffix.lower() in (".npy", ".npz"):
            return _array(path)
        if "idx3" in path.name:
            return _idx_pair(path)
    except (OSError, ValueError, EOFError, KeyError, struct.error, zlib.error) as error:
        raise FileError(f"{path} can't be read as images: {error}.") from error
    raise UsageError(
        f"data {src!r} is no image set that nybble knows: an IDX file, .npy, .npz, or a folder of pictures."
    )


def _array(path: Path) -> ImageSet:
    loaded: Any = np.load(path, allow_pickle=False)
    images, labels = (loaded, None) if path.suffix.lower() == ".npy" else (loaded["images"], loaded.get("labels"))
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{path}: images are {images.dtype} {list(images.shape)}; uint8 [N, H, W] or [N, H, W, 3] needed."
        )
    if labels is not None and labels.shape != (len(images),):
        raise DataError(f"{path}: {len(images)} images and labels of shape {list(labels.shape)}.")
    return ImageSet(images=images, labels=labels, note=f"all of {path.name}")


def _idx_pair(path: Path) -> ImageSet:
    images = _idx(path)
    labels_path = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    labels = _idx(labels_path) if labels_path.exists() and labels_path != path else None
    if images.ndim != 3 or (labels is not None and labels.shape != (len(images),)):
        raise DataError(
            f"{path}: {list(images.shape)} is no set of images, or {labels_path.name} doesn't belong to it."
        )
    return ImageSet(images=images, labels=labels, note=f"all of {path.name}")


def _idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: 0, 0, 8, dimensions, sizes as big-endian 32-bit numbers, values."""
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    zeros, kind, dims = struct.unpack(">HBB", content[:4])
    sizes = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    if zeros != 0 or kind != 8 or len(content) != 4 + 4 * dims + int(np.prod(sizes, dtype=np.int64)):
        raise ValueError(f"no IDX file of unsigned bytes, or a truncated one (sizes {sizes}, {len(content)} bytes)")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(sizes)


class _Pictures:
    """Files that are opened when asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as picture:
                return np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise FileError(f"{self.paths[index]} can't be read as a picture: {error}.") from error


def _folder(path: Path) -> ImageSet:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise UsageError("folders of pictures need Pillow: pip install pillow") from error
    classes = sorted(child.name for child in path.iterdir() if child.is_dir())
    places = [path / name for name in classes] or [path]
    found = [sorted(file for file in place.iterdir() if file.suffix.lower() in _PICTURES) for place in places]
    paths = [file for files in found for file in files]
    if not paths:
        raise DataError(f"{path} holds no pictures ({', '.join(sorted(_PICTURES))}).")
    labels = np.repeat(np.arange(len(places)), [len(files) for files in found]) if classes else None
    kinds = f", {len(classes)} classes" if classes else ""
    note = f"{len(paths)} pictures of {path.name}{kinds}"
    return ImageSet(images=_Pictures(paths), labels=labels, classes=tuple(classes), note=note)
