"""One run of the study: a network trained in one format with one seed, to a JSON file; killed runs resume."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from golden.controller import ControllerState
from golden.network import initial_parameters
from golden.network import resnet18 as golden_resnet18
from lnpu.compiler.graph import resnet18
from lnpu.compiler.policies import FORMATS, STUDY_TARGETS
from lnpu.loss_scaling import LossScaler, LossScaling
from lnpu.results import write_whole
from lnpu.study.data import Batches, StudyData
from lnpu.study.emulation import FP32, Emulation, State, StudyFormat, initial_state
from lnpu.study.kernels import Stored
from lnpu.study.names import COUNTS, STUDY_NAMES

__all__ = [
    "Run",
    "evaluate",
    "get_study_format",
    "train",
]

_VERSION = 1
"""Of what a run computes; results of another are not taken for it."""

_OBSERVED = 8
"""Steps at the end of an epoch of which statistics are kept."""

_TEST_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class Run:
    """What to train, and how.

    Parameters
    ----------
    format : str
        One of `STUDY_NAMES`.
    seed : int
        Of the parameters, and of order, crops and flips of the images.
    data : str
        `StudyData.digest` of the images.
    width, image, epochs, batch : int
        Channels of ResNet-18's first stage, height and width of the images, passes, images a step.
    rate, momentum, decay : float
        SGD: the greatest rate, reached after `warmup` epochs and followed by half a cosine to zero; the decay is of
        weights only.
    warmup : float
        In epochs.
    padding : int
        Pixels of zeros around the images, from which random crops are taken.
    flip : bool
        Half of the images are mirrored.
    scale, interval : int
        First exponent of the loss scale, and clean steps after which it doubles.

    Raises
    ------
    ValueError
        If a number makes no sense or the format is unknown.
    """

    format: str
    seed: int
    data: str
    width: int = 16
    image: int = 16
    epochs: int = 30
    batch: int = 64
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    warmup: float = 2.0
    padding: int = 2
    flip: bool = True
    scale: int = 10
    interval: int = 2000

    def __post_init__(self) -> None:
        if self.format not in STUDY_NAMES:
            raise ValueError(f"format must be one of {', '.join(STUDY_NAMES)}, not {self.format!r}")
        for name in ("width", "image", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        for name in ("seed", "padding", "warmup", "decay", "momentum", "interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)!r}")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, not {self.rate!r}")

    @property
    def key(self) -> str:
        """Identifies the run by everything that its result depends on."""
        content = json.dumps({"version": _VERSION, **asdict(self), "policies": repr(get_study_format(self.format))})
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Short and unique, for files."""
        return f"{self.format}-{self.seed}-{self.key}"

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.format}, seed {self.seed}"

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, with so many steps an epoch."""
        first, total = self.warmup * steps, self.epochs * steps
        if step < first:
            return self.rate * (step + 1) / first
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - first) / max(total - first, 1)))


def get_study_format(name: str) -> StudyFormat:
    """Policies and targets of a format of the study."""
    if name == "fp32":
        return FP32
    formats = FORMATS[name]
    policies = {kind.name: getattr(formats, kind.name) for kind in fields(formats)}
    policies = {kind: policy for kind, policy in policies.items() if policy is not None}
    return StudyFormat(policies, STUDY_TARGETS.get(name, {}))


class _Observer:
    """Adds up what happens to every stored tensor."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.totals: dict[str, list[int]] = {}

    def __call__(self, name: str, kind: str, values: torch.Tensor, stored: Stored) -> None:
        counts = [*(getattr(stored, count) for count in COUNTS), *stored.padded]
        self.kinds[name] = kind
        before = self.totals.get(name)
        self.totals[name] = counts if before is None else [a + b for a, b in zip(before, counts, strict=True)]

    def report(self, formats: Mapping[str, ControllerState]) -> dict[str, Any]:
        """By tensor: kind, counts, and scale, lo and hi (patterns) where the controller has chosen them."""
        tensors = {}
        for name, counts in self.totals.items():
            tensors[name] = {"kind": self.kinds[name], "counts": counts}
            if name in formats:
                chosen = formats[name]
                tensors[name]["state"] = [chosen.scale, chosen.lo, chosen.hi]
        return tensors


def train(
    run: Run,
    data: StudyData,
    checkpoints: Path | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    after_epoch: Callable[[int, State], None] | None = None,
) -> dict[str, Any]:
    """Train, and test after every epoch.

    Parameters
    ----------
    run : Run
    data : StudyData
    checkpoints : path or None
        Folder where every epoch leaves a checkpoint, from which the same run resumes with the same result; it is
        removed at the end.
    progress : callable or None
        Gets the record of every epoch.
    after_epoch : callable or None
        Called after every epoch with its number, from 1 on, and the state, which it must not change.

    Returns
    -------
    dict
        `run`, the parameters, and `epochs`: a list of records with `train_loss`, `test_loss`, `test_accuracy`, `rate`
        (of the last step), `loss_scale` (exponent), `skipped` (updates so far), `seconds` and `tensors` (see `COUNTS`,
        which the bytes of `Stored.padded` follow; the sum over the last 8 steps).

    Raises
    ------
    ValueError
        If `data` is not what the run names, or does not fit it.
    """
    if data.digest != run.data:
        raise ValueError(f"data must be {run.data}, not {data.digest}")
    if data.train.shape[1:3] != (run.image, run.image):
        raise ValueError(f"images must be {run.image} pixels high and wide, not {data.train.shape[1:3]}")
    channels = data.train.shape[3]
    graph = resnet18(width=run.width, channels=channels, image=run.image, classes=data.classes)
    formats = get_study_format(run.format)
    network = Emulation(graph, formats, momentum=run.momentum, decay=run.decay)
    layers = golden_resnet18(width=run.width, classes=data.classes)
    state = initial_state(graph, initial_parameters(layers, channels, run.seed), formats)
    scaler = LossScaler(LossScaling(start=run.scale, interval=run.interval))
    records: list[dict[str, Any]] = []
    checkpoint = checkpoints / f"{run.name}.pt" if checkpoints is not None else None
    if checkpoint is not None and checkpoint.exists():
        state, records = _restore(checkpoint, scaler)
    for epoch in range(len(records), run.epochs):
        started = time.perf_counter()
        record: dict[str, Any] = {"epoch": epoch + 1} | _epoch(run, data, network, state, scaler, epoch)
        record |= evaluate(network, state, data)
        record |= {"loss_scale": scaler.exponent, "skipped": scaler.skipped}
        record["seconds"] = round(time.perf_counter() - started, 2)
        records.append(record)
        if progress is not None:
            progress(record)
        if after_epoch is not None:
            after_epoch(epoch + 1, state)
        if checkpoint is not None:
            _save(checkpoint, state, scaler, records)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return {"version": _VERSION, "run": asdict(run), "epochs": records}


def _epoch(
    run: Run, data: StudyData, network: Emulation, state: State, scaler: LossScaler, epoch: int
) -> dict[str, Any]:
    """Train for an epoch: part of its record."""
    batches = Batches(data.train, run.batch, (run.seed, epoch), padding=run.padding, flip=run.flip)
    observer, losses, rate = _Observer(), [], 0.0
    for number, (images, chosen) in enumerate(batches):
        network.observer = observer if number >= len(batches) - _OBSERVED else None
        rate = run.rate_at(epoch * len(batches) + number, len(batches))
        logits, tensors, saved = network.forward(state, torch.from_numpy(images))
        loss, error = network.loss(logits, data.train_labels[chosen], scaler.scale)
        gradients, overflow = network.backward(state, tensors, saved, error)
        scale = scaler.scale
        if scaler.step(overflow):
            network.update(state, gradients, rate, scale)
        losses.append(loss)
    network.observer = None
    return {"rate": rate, "train_loss": _number(np.mean(losses)), "tensors": observer.report(state.formats)}


def evaluate(network: Emulation, state: State, data: StudyData) -> dict[str, Any]:
    """Loss and accuracy (0 to 1) of the test set, with running statistics."""
    right, loss = 0, 0.0
    for start in range(0, len(data.test), _TEST_BATCH):
        part = slice(start, start + _TEST_BATCH)
        labels = data.test_labels[part]
        logits, _, _ = network.forward(state, torch.from_numpy(data.test[part]), training=False)
        loss += network.loss(logits, labels, 1.0)[0] * len(labels)
        right += int((logits.argmax(1).numpy() == labels).sum())
    return {"test_loss": _number(loss / len(data.test)), "test_accuracy": right / len(data.test)}


def _number(value: Any) -> float | None:
    """For JSON, which has neither infinity nor NaN."""
    return float(value) if math.isfinite(value) else None


def _save(path: Path, state: State, scaler: LossScaler, records: list[dict[str, Any]]) -> None:
    content = {field.name: getattr(state, field.name) for field in fields(state)}
    content["formats"] = {name: (one.scale, one.lo, one.hi) for name, one in state.formats.items()}
    content |= {"scaler": scaler.state(), "records": json.dumps(records)}
    write_whole(path, lambda part: torch.save(content, part))


def _restore(path: Path, scaler: LossScaler) -> tuple[State, list[dict[str, Any]]]:
    content = torch.load(path, weights_only=True)
    scaler.restore(content.pop("scaler"))
    records = json.loads(content.pop("records"))
    content["formats"] = {name: ControllerState(*one) for name, one in content["formats"].items()}
    return State(**content), records
