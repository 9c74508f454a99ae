"""How far weight gradients are from those of FP32 at the same parameters and images, by format and share of FP16."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from golden.fgmp import Policy
from lnpu.compiler.graph import Graph, resnet18
from lnpu.study.data import Batches, StudyData
from lnpu.study.emulation import FP32, Emulation, State, StudyFormat
from lnpu.study.kernels import store
from lnpu.study.names import STUDY_NAMES
from lnpu.study.runs import Run, get_study_format, train

__all__ = ["FLUSH", "SHARES", "SWEPT", "Case", "GradientRun", "cases", "measure", "policy_by_share"]

SHARES = (0.0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the non-zeros, the largest, that stay FP16; the others become FP8."""

FLUSH = 0.3
"""Share of the non-zero errors, the smallest, that become zeros."""

SWEPT = ("activation", "preactivation", "weight", "error", "gradient")
"""Kinds of tensors that are quantised one at a time, all others being FP32; and then all of them."""

_VERSION = 1
_SETTLE = 24
"""Steps without an update in which the controller finds its limits: `hi` needs four for a factor of two."""

_MOST = 0x7BFF
_FP8_MOST = 448.0 / 512.0


@dataclass(frozen=True)
class Case:
    """What is quantised, and how.

    Parameters
    ----------
    kind : str
        A kind of tensors, "all" of them, or a format of the study.
    share : float or None
        Of FP16 in the non-zeros; None: as the format has it.
    flush : float
        Share of errors that become zeros.
    """

    kind: str
    share: float | None = None
    flush: float = 0.0


def cases() -> list[Case]:
    """All that are measured."""
    found = [Case(name) for name in STUDY_NAMES if name != "fp32"]
    for kind in (*SWEPT, "all"):
        for flush in (0.0, FLUSH) if kind in ("error", "all") else (0.0,):
            found += [Case(kind, share, flush) for share in SHARES]
    return found


@dataclass(frozen=True, kw_only=True)
class GradientRun:
    """What to measure.

    Parameters
    ----------
    training : Run
        Training in FP32.
    epochs : tuple of int
        After which it is measured.
    batches : int
        Over which it is averaged.

    Raises
    ------
    ValueError
        If the format is another or the training never gets to an epoch.
    """

    training: Run
    epochs: tuple[int, ...] = (1, 3, 6)
    batches: int = 3

    def __post_init__(self) -> None:
        if self.training.format != "fp32":
            raise ValueError(f"gradients are measured along a training in fp32, not {self.training.format}")
        if not self.epochs or not all(1 <= epoch <= self.training.epochs for epoch in self.epochs):
            raise ValueError(f"epochs must be 1 to {self.training.epochs}, not {self.epochs!r}")
        if self.batches < 1:
            raise ValueError(f"batches must be at least 1, not {self.batches!r}")

    @property
    def key(self) -> str:
        """Identifies the run by everything that its result depends on."""
        formats = [repr(get_study_format(name)) for name in STUDY_NAMES]
        content = json.dumps({"version": _VERSION, **asdict(self), "training": self.training.key, "formats": formats})
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Short and unique, for files."""
        return f"gradients-{self.training.seed}-{self.key}"

    @property
    def title(self) -> str:
        """For people."""
        return f"gradient errors, seed {self.training.seed}"


def policy_by_share(x: torch.Tensor, share: float, flush: float = 0.0) -> Policy:
    """Scale and limits for one tensor: the best that a controller could know.

    Parameters
    ----------
    x : float32 tensor
    share : float
        Of the non-zeros that are left, the largest that stay FP16 (rather fewer).
    flush : float
        Of the non-zeros, the smallest that become zeros (rather fewer).

    Returns
    -------
    Policy
        Its scale puts the largest element from 224 to 448, so that FP8 does not saturate.
    """
    largest = float(x.abs().max())
    if not 0 < largest < math.inf:
        return Policy()
    fraction, exponent = math.frexp(largest)
    scale = min(max(exponent - 9 + (fraction > _FP8_MOST), -64), 63)
    patterns = (x * 2.0**-scale).abs().half().view(torch.int16).numpy().reshape(-1)
    total = np.cumsum(np.bincount(patterns, minlength=_MOST + 1)[1:])  # elements up to pattern 1, 2, ...
    nonzero = total[-1]
    lo = int(np.searchsorted(total, flush * nonzero, side="right")) + 1 if flush else 0
    kept = nonzero - (total[lo - 2] if lo > 1 else 0)
    below = "zero" if flush else "fp16"
    if share >= 1:
        return Policy(scale, lo, lo, below)
    hi = int(np.searchsorted(total, nonzero - share * kept, side="left")) + 1
    return Policy(scale, lo, max(hi, lo), below)


class _Sweep(Emulation):
    """Stores the tensors of a case by `policy_by_share`, all others in FP32."""

    def __init__(self, graph: Graph, case: Case) -> None:
        super().__init__(graph, FP32)
        self.case = case

    def _policy_of(self, kind: str, x: torch.Tensor) -> Policy | None:
        if self.case.share is None or self.case.kind not in (kind, "all"):
            return None
        return policy_by_share(x, self.case.share, self.case.flush if kind == "error" else 0.0)

    def _store(
        self, state: State, name: str, kind: str, x: torch.Tensor, *, frozen: bool = False, **formula: Any
    ) -> torch.Tensor:
        sums = formula.pop("sums", None)  # of what is rounded to FP16
        plain, _ = store(x, None, **formula)
        return store(plain, self._policy_of(kind, plain), out=plain, sums=sums)[0]

    def _encode(self, name: str, kind: str, x: torch.Tensor) -> torch.Tensor:
        return store(x, self._policy_of(kind, x))[0]


Batch = tuple[torch.Tensor, NDArray[np.int64]]


def _gradients(network: Emulation, state: State, batch: Batch, loss_scale: float) -> list[NDArray[np.float64]]:
    """Weight gradients by layer, flat."""
    logits, tensors, saved = network.forward(state, batch[0])
    _, error = network.loss(logits, batch[1], loss_scale)
    gradients, _ = network.backward(state, tensors, saved, error)
    return [gradients[name].numpy().ravel().astype(np.float64) for name in state.weights]


def _states(network: Emulation, trained: State, batches: list[Batch], loss_scale: float) -> Iterator[State]:
    """For each batch a state with the trained parameters, and formats that the controller has settled on them."""
    state = State(trained.parameters, {}, dict(trained.running), dict(trained.weights))
    weights = [name for name, value in trained.parameters.items() if value.ndim == 4]
    for number in range(_SETTLE if network.formats.targets else 1):
        for name in weights:
            state.weights[name] = network._store(state, f"w.{name}", "weight", trained.parameters[name])
        if network.formats.targets:
            _gradients(network, state, batches[number % len(batches)], loss_scale)
    for _ in batches:
        yield State(trained.parameters, {}, dict(trained.running), state.weights, dict(state.formats))


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """1 - cosine; 1 for what is zero."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return 1.0 - float(a @ b) / norms if norms else 1.0


def _compare(graph: Graph, trained: State, batches: list[Batch], loss_scale: float) -> dict[str, Any]:
    """All cases at the parameters of `trained`."""
    exact = Emulation(graph, FP32)
    states = _states(exact, trained, batches, loss_scale)
    references = [_gradients(exact, state, batch, loss_scale) for state, batch in zip(states, batches, strict=True)]
    pairs = [(a, b) for i, a in enumerate(references) for b in references[:i]]
    noise = [np.mean([_distance(a[layer], b[layer]) for a, b in pairs]) for layer in range(len(trained.weights))]
    found = []
    for case in cases():
        format_ = get_study_format(case.kind) if case.share is None else StudyFormat()
        network = Emulation(graph, format_) if case.share is None else _Sweep(graph, case)
        distance, error = [], []
        for state, batch, reference in zip(
            _states(network, trained, batches, loss_scale), batches, references, strict=True
        ):
            gradients = _gradients(network, state, batch, loss_scale)
            distance.append([_distance(a, b) for a, b in zip(gradients, reference, strict=True)])
            error.append(
                [
                    float(np.linalg.norm(a - b)) / (float(np.linalg.norm(b)) or 1.0)
                    for a, b in zip(gradients, reference, strict=True)
                ]
            )
        found.append(asdict(case) | {"distance": _means(distance), "error": _means(error)})
    return {"noise": _rounded(noise) if pairs else None, "cases": found}


def _means(rows: list[list[float]]) -> list[float]:
    return _rounded(np.mean(rows, axis=0))


def _rounded(values: Any) -> list[float]:
    """Three digits; what is not finite has its greatest distance."""
    return [float(f"{value:.3g}") if math.isfinite(value) else 1.0 for value in values]


def measure(
    run: GradientRun, data: StudyData, progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Train in FP32, and compare gradients on the way.

    Parameters
    ----------
    run : GradientRun
    data : StudyData
    progress : callable or None
        As of `lnpu.study.runs.train`.

    Returns
    -------
    dict
        `run`, the parameters; `layers`, their names; `epochs`, for each measured epoch a record with `epoch`, `noise`
        (by layer 1 - cosine of the gradients of two batches; None if there is only one) and `cases`: for each the
        fields of `Case`, and by layer `distance`, 1 - cosine against FP32, and `error`, the relative norm of the
        difference.

    Raises
    ------
    ValueError
        As of `train`.
    """
    settings = run.training
    graph = resnet18(width=settings.width, channels=data.train.shape[3], image=settings.image, classes=data.classes)
    layers: list[str] = []
    records: list[dict[str, Any]] = []

    def after_epoch(epoch: int, state: State) -> None:
        if epoch not in run.epochs:
            return
        layers[:] = state.weights
        seed = (settings.seed, settings.epochs + epoch)  # images in an order that training does not have
        augmented = Batches(data.train, settings.batch, seed, padding=settings.padding, flip=settings.flip)
        batches = [
            (torch.from_numpy(images), data.train_labels[chosen])
            for (images, chosen), _ in zip(augmented, range(run.batches), strict=False)
        ]
        records.append({"epoch": epoch} | _compare(graph, state, batches, 2.0**settings.scale))

    train(settings, data, None, progress, after_epoch)
    return {"version": _VERSION, "run": asdict(run), "layers": layers, "epochs": records}
