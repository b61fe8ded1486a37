"""A detector on drawn scenes, a separator of drawn voices: the networks, their losses, their measures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

import nybble
from nybble.core.errors import ModelError, NybbleError, UsageError
from nybble.core.progress import Silent
from nybble.data import scenes, voices
from nybble.data.samples import InMemory
from nybble.models.own.detector import Detector, DetectorConfig, cells_of, overlap
from nybble.models.own.separator import Separator, SeparatorConfig, best_si_sdr, si_sdr
from nybble.training.tasks import TASKS, task_of
from nybble.training.tasks._boxes import average_precision, found_in

NAMES = dict(enumerate(scenes.CLASSES))


def detector(**more: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = Detector(DetectorConfig(image_size=32, widths=(8, 8), **{"id2label": NAMES, **more}))
    return made.eval()


def separator(**more: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = Separator(SeparatorConfig(filters=16, window=32, width=8, hidden=16, depth=2, repeats=1, **more))
    return made.eval()


@pytest.mark.parametrize("made", [detector(), separator()], ids=["detector", "separator"])
def test_folders_load_here_and_in_transformers(tmp_path: Path, made: Any) -> None:
    made.save_pretrained(tmp_path / "it")
    x = torch.randn(2, 1, 32, 32) if isinstance(made, Detector) else torch.randn(2, 500)
    here, _ = nybble.load(tmp_path / "it", dtype="float32")
    there = transformers.AutoModel.from_pretrained(tmp_path / "it").eval()
    for loaded in (here, there):
        assert type(loaded) is type(made) and torch.equal(loaded(x).logits, made(x).logits)
    assert TASKS.key_of(task_of(here, "it")) == ("detection" if isinstance(made, Detector) else "separation")


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
@pytest.mark.parametrize("network", [detector, separator])
def test_they_are_calibrated_on_tensors(tmp_path: Path, network: Any, recipe: str) -> None:
    """From a folder in bfloat16, and in memory."""
    made = network()
    sound = isinstance(made, Separator)
    x = torch.randn(2, 400) if sound else torch.randn(2, made.config.num_channels, *[made.config.image_size] * 2)
    made.save_pretrained(tmp_path / "float")
    asked: dict[str, Any] = {"weights": "int3 channel", "settings": {"samples": 2, "batch": 1}}
    quantized, report = nybble.quantize(tmp_path / "float", recipe, x, **asked)
    assert {p.dtype for p in quantized.parameters()} <= {torch.bfloat16} and report.layers
    assert quantized(x.bfloat16()).logits.isfinite().all()
    with torch.no_grad():
        exact = made(x).logits
        low = nybble.quantize(made, recipe, x, **asked)[0](x).logits
    assert 0 < (low - exact).square().mean() < exact.square().mean()


# ------------------------------------------------------------------------------------------------------------- scenes
def test_scenes_are_their_own(tmp_path: Path) -> None:
    model: dict[str, Any] = {"size": 32, "channels": 1, "classes": 3}
    few, more = (scenes.load_scenes(src, "calibration", **model) for src in ("scenes:3", "scenes:5"))
    for a, b in zip(few.rows, more.rows, strict=False):
        assert np.array_equal(a["image"], b["image"]) and np.array_equal(a["objects"], b["objects"])
    others = [
        scenes.load_scenes("scenes:3:1", "calibration", **model),
        scenes.load_scenes("scenes:3", "evaluation", **model),
    ]
    assert len({few.sha256, more.sha256, *(other.sha256 for other in others)}) == 4
    batch = scenes.collate(more.rows)
    assert batch["labels"].shape == (5, scenes.MOST, 5) and batch["pixel_values"].abs().max() <= 1
    assert (batch["labels"][..., 0] >= 0).sum() == more.manifest()["objects"]


@pytest.mark.parametrize("kind", range(3))
def test_boxes_are_as_large_as_what_is_drawn(kind: int) -> None:
    y, x = np.mgrid[:64, :64] + 0.5
    inside = scenes._inside(kind, x - 30, y - 25, 10)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    tip = int(scenes.CLASSES[kind] == "triangle")  # narrower than a pixel, so no pixel's centre is in it
    assert (rows[0] - tip, rows[-1], columns[0], columns[-1]) == (15, 34, 20, 39)


def test_the_cell_of_a_centre_tells_the_object() -> None:
    labels = torch.full((2, 3, 5), -1.0)
    labels[0, 0] = torch.tensor([1, 0.0, 0.0, 0.5, 0.5])  # its centre is in cell (1, 1) of 4 x 4
    labels[0, 1] = torch.tensor([2, 0.25, 0.25, 0.35, 0.35])  # a smaller one of the same cell
    labels[1, 2] = torch.tensor([0, 0.8, 0.4, 1.0, 0.6])
    classes, boxes = cells_of(labels, 4, 4, 3)
    assert classes[0].tolist() == [3] * 5 + [2] + [3] * 10 and torch.equal(boxes[0, 5], labels[0, 1, 1:])
    assert classes[1].tolist() == [3] * 11 + [0] + [3] * 4 and torch.equal(boxes[1, 11], labels[1, 2, 1:])


def test_overlaps() -> None:
    a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0])
    assert overlap(a, b, hull=False).item() == pytest.approx(1 / 3)
    assert overlap(a, b).item() == pytest.approx(1 / 3)  # their hull is full
    assert overlap(a, a + 3).item() == pytest.approx(-(25 - 8) / 25)


def box(kind: int, likely: float | None, at: float) -> list[float]:
    return [kind, *([] if likely is None else [likely]), at, 0.0, at + 0.1, 0.1]


def test_average_precision_by_hand() -> None:
    wanted = [torch.tensor([box(0, None, 0.0), box(0, None, 0.5)])]
    found = [torch.tensor([box(0, 0.9, 0.0), box(0, 0.8, 0.3), box(0, 0.7, 0.5)])]
    assert average_precision(found, wanted) == pytest.approx(0.5 + 0.5 * 2 / 3)
    twice = [torch.tensor([box(0, 0.9, 0.0), box(0, 0.8, 0.01), box(0, 0.7, 0.5)])]
    assert average_precision(twice, wanted) == pytest.approx(0.5 + 0.5 * 2 / 3)  # one object is found once
    both = [torch.cat([wanted[0], torch.tensor([box(1, None, 0.8)])])]
    assert average_precision(found, both) == pytest.approx((0.5 + 0.5 * 2 / 3) / 2)
    assert average_precision([torch.zeros(0, 6)], wanted) == 0


def test_the_likeliest_of_a_place_is_kept() -> None:
    logits = torch.tensor([[4.0, 0, 0, 0], [5.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 0, 9.0]])
    boxes = torch.tensor([[0.0, 0, 0.5, 0.5], [0.0, 0, 0.5, 0.55], [0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    found = found_in(logits, boxes)
    assert found[:, 0].tolist() == [0, 1] and torch.equal(found[0, 2:], boxes[1])


def test_what_tells_all_has_full_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's numbers set to the labels: nothing is left of the loss of boxes, all objects are found."""
    made, task = detector(), TASKS.get("detection")
    rows = task.load("scenes:12", InMemory(made.config), made, 1, "evaluation").rows

    class Told(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            known = [scenes.collate([row]) for row in rows]
            labels = torch.cat([a["labels"] for x in pixels for a in known if torch.equal(a["pixel_values"][0], x)])
            classes, boxes = cells_of(labels, 8, 8, 3)
            logits = 20 * functional.one_hot(classes, 4).float()
            number = torch.arange(64)
            inner = (boxes[..., :2] + boxes[..., 2:]) / 2 * 8 - torch.stack([number % 8, number // 8], -1)
            size = ((boxes[..., 2:] - boxes[..., :2]) * 8).clamp_min(1e-3).log()
            return torch.cat([logits, inner.logit(1e-6), size], -1).transpose(1, 2).reshape(-1, 8, 8, 8)

    monkeypatch.setattr(made, "net", Told())
    made.register_parameter("any", torch.nn.Parameter(torch.zeros(1)))
    found = task.measure(made, InMemory(made.config), rows, 4, Silent())
    assert found["loss"] < 1e-3 and found["map50"] > 0.95  # two centres may share a cell
    shown = task.samples(made, InMemory(made.config), rows)
    assert shown[0]["text"] == shown[0]["target"] != ""


# ------------------------------------------------------------------------------------------------------------- voices
def test_the_ratio_is_of_shape_not_of_size() -> None:
    wanted, noise = torch.randn(2, 3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted, noise = (x - x.mean(-1, keepdim=True) for x in (wanted, noise))
    noise -= (noise * wanted).sum(-1, keepdim=True) / wanted.square().sum(-1, keepdim=True) * wanted
    noise *= (wanted.square().sum(-1, keepdim=True) / noise.square().sum(-1, keepdim=True)).sqrt() / 10  # 20 dB below
    for size in (0.1, 1, -7):
        assert si_sdr(size * (wanted + noise) + 3, wanted).tolist() == pytest.approx([20] * 3, abs=1e-4)


def test_voices_may_come_in_any_order() -> None:
    wanted = torch.randn(4, 2, 300, generator=torch.Generator().manual_seed(0))
    found = wanted + 0.1 * torch.randn(4, 2, 300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(best_si_sdr(found.flip(1), wanted), best_si_sdr(found, wanted))
    assert best_si_sdr(found, wanted).mean() == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize("samples", [320, 333])
def test_overlap_and_add_is_a_transposed_convolution(samples: int) -> None:
    made = separator()
    x, half = torch.randn(2, samples, generator=torch.Generator().manual_seed(0)), 16
    wide = functional.pad(x, (half, half + (-samples) % half))
    frames = functional.relu(made.encoder(wide[:, None]))
    masked = made.masks(frames).unflatten(1, (2, 16)) * frames[:, None]
    kernel = made.decoder.weight.t()[:, None]
    theirs = functional.conv_transpose1d(masked.flatten(0, 1), kernel, stride=half)[:, 0]
    found = made(x).logits
    assert found.shape == (2, 2, samples)
    assert torch.allclose(found.flatten(0, 1), theirs[:, half : half + samples], atol=1e-6)


@torch.no_grad()
def test_frames_are_whole_and_long_enough() -> None:
    """Masks of 1 give the mixture back; the best masks part drawn voices, as frames of 8 ms would not let them."""
    made: Any = Separator(SeparatorConfig())
    batch = TASKS.get("separation").collate(voices.load_voices("voices:4", "evaluation", rate=8000).rows)
    mixture, wanted = batch["input_values"][:, :2501], batch["labels"][..., :2501]
    made.masks[-2].weight.zero_()
    made.masks[-2].bias.fill_(50.0)
    torch.testing.assert_close(made(mixture).logits, mixture[:, None].expand(-1, 2, -1), rtol=0, atol=1e-5)
    reached = []
    for window in (256, 64):
        made = Separator(SeparatorConfig(window=window, filters=2 * window))
        half = window // 2
        wide = functional.pad(wanted, (half, half + (-wanted.shape[-1]) % half))
        power = made.encoder(wide.flatten(0, 1)[:, None]).unflatten(0, (-1, 2)).square()
        power = (power + power.roll(-1, -2))[:, :, ::2].repeat_interleave(2, 2)  # of a cosine and its sine
        made.masks = _Fixed(power / power.sum(1, keepdim=True).clamp_min(1e-12))
        reached.append(best_si_sdr(made(mixture).logits, wanted).mean().item())
    assert reached[0] > 10 and reached[1] < reached[0] - 3


class _Fixed(torch.nn.Module):
    """Masks that are known, [mixtures, voices, filters, frames]."""

    def __init__(self, masks: Tensor) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, frames: Tensor) -> Tensor:
        return self.masks.flatten(1, 2)


def test_voices_have_their_pitch() -> None:
    """The strongest of the spectrum's spacings lies in each voice's range; the measures begin with the mixture's."""
    data = voices.load_voices("voices:4", "calibration", rate=8000)
    for row in data.rows:
        for wave, (low, high) in zip(row["voices"], voices.PITCHES, strict=True):
            part = wave[2000:4000] * np.hanning(2000)
            ring = np.fft.irfft(np.abs(np.fft.rfft(part, 8192)) ** 2)[:200]
            lag = int(8000 / (1.2 * high)) + int(np.argmax(ring[int(8000 / (1.2 * high)) : int(8000 / (0.8 * low))]))
            assert 0.8 * low < 8000 / lag < 1.2 * high
    made, task = separator(), TASKS.get("separation")
    found = task.measure(made, InMemory(made.config), data.rows, 3, Silent())
    batch = task.collate(data.rows)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(made(**batch).loss.item(), abs=1e-4)
    mixed = best_si_sdr(batch["input_values"][:, None].expand(-1, 2, -1), batch["labels"]).mean().item()
    assert found["si_sdri"] == pytest.approx(found["si_sdr"] - mixed, abs=1e-4) and math.isfinite(found["si_sdr"])
    assert task.samples(made, InMemory(made.config), data.rows)[0]["prompt"].startswith("mixture 0, ")


@pytest.mark.parametrize(
    ("made", "src", "kind", "message"),
    [
        (detector(), "builtin", UsageError, r"say scenes:COUNT, or scenes:COUNT:SEED"),
        (detector(), "scenes:0", UsageError, "say scenes:COUNT"),
        (detector(id2label={0: "a", 1: "b"}), "scenes:1", UsageError, "3 kinds of objects .* has 2 classes and 32"),
        (separator(), "scenes:4", UsageError, "say voices:COUNT"),
        (separator(voices=3), "voices:4", ModelError, "it separates 3 voices"),
    ],
)
def test_what_is_refused(made: Any, src: str, kind: type[NybbleError], message: str) -> None:
    task = task_of(made, "it")
    with pytest.raises(kind, match=message):
        task.check(made, "it", 1)
        task.load(src, InMemory(made.config), made, 1, "calibration")
