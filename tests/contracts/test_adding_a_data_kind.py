"""New kinds of data from outside: entry points of another package, none of nybble's files touched.

``signals``, one-dimensional float signals of an .npy file, feed a tiny Conv1d network; ``codes``, which come with a
timestep each, feed a stack of blocks. Both are calibrated and judged by the same pipelines as text and images are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

ENTRY_POINTS = """\
[nybble.data.kinds]
signals = outside.signals:KIND
codes = outside.latents:KIND
lonely = outside.signals:KIND
[nybble.eval.judges]
signals = outside.judges:SIGNALS
codes = outside.judges:LATENTS
[nybble.models.adapters]
signal-net = outside.signals:ADAPTER
latent-net = outside.latents:ADAPTER
lonely-net = outside.signals:LONELY
odd-net = outside.signals:ODD
"""

SIGNALS = """
import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from nybble.core.errors import DataError
from nybble.data.kinds import DataKind
from nybble.models.adapter import Adapter


@dataclass(frozen=True)
class Signals:
    signal: torch.Tensor
    source: str
    available: int

    @property
    def inputs(self):
        return {"signal": self.signal}

    @property
    def tokens(self):
        return self.signal.shape[0] * self.signal.shape[2]

    def manifest(self):
        digest = hashlib.sha256(self.signal.numpy().tobytes()).hexdigest()
        return {"source": self.source, "samples": len(self.signal), "signal_sha256": digest}


class SignalKind(DataKind):
    def prepare(self, src, origin, wanted):
        values = torch.from_numpy(np.load(src)).float()[:, None] / origin.config.gain
        count = len(values) if wanted.samples is None or wanted.fewer else wanted.samples
        return Signals(values[: min(count, wanted.samples or count)], src, len(values))

    def check(self, samples, model):
        super().check(samples, model)
        if samples.inputs["signal"].shape[1] != 1:
            raise DataError("one channel a signal, please")


class SignalConfig(PreTrainedConfig):
    model_type = "signal_net"
    gain = 4.0


class SignalNet(PreTrainedModel):
    config_class = SignalConfig
    main_input_name = "signal"

    def __init__(self, config):
        super().__init__(config)
        self.net = nn.Sequential(
            nn.Conv1d(1, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, 1, 1, groups=4), nn.ReLU(),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4),
        )

    def forward(self, signal):
        return self.net(signal)


KIND = SignalKind()
ADAPTER = Adapter(
    name="signal-net", model_types=("signal_net",), blocks="net", embeddings=(), final_norm=None, head=None,
    reads="signals", convolutional=True,
)
LONELY = replace(ADAPTER, name="lonely-net", model_types=("lonely_net",), reads="lonely")
ODD = replace(ADAPTER, name="odd-net", model_types=("odd_net",), reads="signal")
"""

LATENTS = """
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from nybble.data.kinds import DataKind, Size
from nybble.models.adapter import Adapter


@dataclass(frozen=True)
class Latents:
    inputs: dict
    source: str
    tokens: int
    available: int

    def manifest(self):
        return {"source": self.source, "samples": self.available, "latents_sha256": "00"}


class LatentKind(DataKind):
    def prepare(self, src, origin, wanted):
        count = wanted.samples or 12
        generator = torch.Generator().manual_seed(wanted.seed or int(src))
        x = torch.randn(count, 10, origin.config.hidden_size, generator=generator)
        keep = torch.ones(count, 10, dtype=torch.bool)
        keep[::2, 7:] = False
        x[~keep] = 1e4  # a wrong mask would ruin every scale
        t = torch.rand(count, generator=generator)
        return Latents({"latents": x, "timestep": t, "kept": keep}, src, int(keep.sum()), count)

    def real(self, inputs):
        return inputs["kept"]

    def size(self, samples):
        return Size(samples.available, 10)


class LatentConfig(PreTrainedConfig):
    model_type = "latent_net"
    hidden_size = 16


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states, timestep):
        return hidden_states + self.down(torch.relu(self.up(hidden_states * timestep[:, None, None])))


class LatentNet(PreTrainedModel):
    config_class = LatentConfig
    main_input_name = "latents"

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config.hidden_size) for _ in range(2))

    def forward(self, latents, timestep, kept):
        for block in self.blocks:
            latents = block(latents, timestep)
        return latents * kept[..., None]


KIND = LatentKind()
ADAPTER = Adapter(
    name="latent-net", model_types=("latent_net",), blocks="blocks", embeddings=(), final_norm=None, head=None,
    reads="codes",
)
"""

JUDGES = '''
import torch

from nybble.core.errors import UsageError
from nybble.data.kinds import data_kind
from nybble.eval.judges import Judge, Verdict


class Distance(Judge):
    """Relative distance of the outputs, in batches of four."""

    def __init__(self, kind):
        self.kind = kind

    @property
    def metrics(self):
        return ("distance",)

    def judge(self, panel, progress):
        if panel.reference is None:
            raise UsageError("the outputs are compared with the float model's")
        kind, inputs = data_kind(self.kind), panel.samples.inputs
        count = kind.size(panel.samples).samples

        def run(model):
            found = []
            for start in range(0, count, 4):
                given = {n: t.to(model.dtype) if t.is_floating_point() else t
                         for n, t in kind.batch(inputs, start, start + 4, model.device).inputs.items()}
                found.append(model(**given).float())
            return torch.cat(found)

        exact = run(panel.reference)
        return Verdict(
            metrics={n: {"distance": float((run(m) - exact).norm() / exact.norm())} for n, m in panel.models.items()},
            counts={"judged": count},
        )


SIGNALS, LATENTS = Distance("signals"), Distance("codes")
'''

RUN = """
import copy, json, sys
import torch
import nybble
from nybble.core.errors import NybbleError
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.request import build_recipe
from outside.latents import LatentConfig, LatentNet
from outside.signals import SignalConfig, SignalNet

torch.set_num_threads(1)
torch.manual_seed(0)
result = {"kinds": sorted(__import__("nybble.data.kinds", fromlist=["x"]).KINDS.names())}
for name, model, data, batch in (
    ("signals", SignalNet(SignalConfig()), sys.argv[1], 3), ("codes", LatentNet(LatentConfig()), "7", 5),
):
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.2), module.running_var.uniform_(0.5, 2)
    quantized = {}
    for bits in (8, 3):
        recipe = build_recipe("minmax-int", weights=f"int{bits} channel", activations=f"int{bits} tensor static")
        settings = nybble.Settings(batch=batch, dtype=torch.float32)
        quantized[f"int{bits}"], report = nybble.quantize(copy.deepcopy(model), recipe, data, settings=settings)
    found = run_eval({"float": model, **quantized}, data, reference=model)
    found["manifest"], found["layers"] = report.manifest["data"], [row.name for row in report.layers]
    result[name] = found

def refused(call):
    try:
        call()
    except NybbleError as error:
        return str(error)

int8 = build_recipe("minmax-int", weights="int8 channel", activations="int8 tensor static")
class Lonely(SignalConfig):
    model_type = "lonely_net"
class Odd(SignalConfig):
    model_type = "odd_net"
result["refused"] = {
    "no judge": refused(lambda: run_eval({"x": SignalNet(Lonely())}, sys.argv[1])),
    "no such kind": refused(lambda: nybble.quantize(SignalNet(Odd()).eval(), int8, sys.argv[1])),
    "metric": refused(lambda: run_eval({"x": SignalNet(SignalConfig())}, sys.argv[1], metrics=["ppl"])),
    "unknown": refused(lambda: run_eval({"x": SignalNet(SignalConfig())}, sys.argv[1], metrics=["distanse"])),
    "mixed": refused(lambda: run_eval({"x": SignalNet(SignalConfig()), "y": LatentNet(LatentConfig())}, sys.argv[1])),
}
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process says that has the other package on its path."""
    site = tmp_path_factory.mktemp("site")
    (site / "outside").mkdir()
    (site / "outside_kinds-1.0.dist-info").mkdir()
    (site / "outside_kinds-1.0.dist-info" / "METADATA").write_text("Name: outside-kinds\nVersion: 1.0\n")
    (site / "outside_kinds-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    for name, text in {"__init__": "", "signals": SIGNALS, "latents": LATENTS, "judges": JUDGES}.items():
        (site / "outside" / f"{name}.py").write_text(text)
    (site / "run.py").write_text(RUN)
    signals = np.random.default_rng(0).normal(0, 4, (9, 40)).astype(np.float32)
    np.save(site / "signals.npy", signals)
    paths = os.pathsep.join([str(site), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, str(site / "run.py"), str(site / "signals.npy")],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kind_from_outside_is_calibrated_and_judged(found: Any) -> None:
    assert {"codes", "images", "sentences", "signals", "tokens"} <= set(found["kinds"])
    for name, samples in (("signals", 9), ("codes", 12)):
        models = found[name]["models"]
        assert models["float"] == {"distance": 0}
        assert 0 < models["int8"]["distance"] < 0.03 < models["int3"]["distance"]
        assert found[name]["data"]["judged"] == samples  # the judge's count stands in the manifest
        assert "samples" in found[name]["manifest"]
    assert len(found["signals"]["layers"]) == 3 and len(found["codes"]["layers"]) == 4


def test_what_is_missing_is_named(found: Any) -> None:
    refused = found["refused"]
    assert "nothing judges a model of lonely yet" in refused["no judge"]
    assert "unknown kind of data 'signal'. Did you mean 'signals'?" in refused["no such kind"]
    assert "a model of signals is judged by distance; not by ppl" in refused["metric"]
    assert "unknown metric 'distanse'. Did you mean 'distance'?" in refused["unknown"]
    assert "x reads signals, y reads codes" in refused["mixed"]
