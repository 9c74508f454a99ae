"""A training step as the chip computes it, in PyTorch: same operands, same places of rounding, but sums in FP32.

Follows docs/training.md; the twin with exact sums is `golden.network`. Tensors are float32 and hold what is read back
from memory, channels last: [N, H, W, C], weights [O, R, S, I]. Where operands are infinite or NaN, zeros are not
skipped as in the chip, but such a step's update is skipped anyhow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from golden.controller import ControllerState, Targets, adapt
from golden.fgmp import Policy
from golden.vector import loss_and_gradient
from lnpu.compiler.graph import (
    Conv,
    ConvStage,
    GlobalAveragePool,
    Graph,
    GroupStage,
    Linear,
    LinearStage,
    MaxPool,
    PoolStage,
    fuse,
)
from lnpu.study.kernels import Stored, channel_sums, momentum_update, store

__all__ = [
    "FP32",
    "KINDS",
    "WEIGHT_KINDS",
    "Emulation",
    "State",
    "StudyFormat",
    "from_nchw",
    "initial_state",
    "to_nchw",
]

KINDS = ("activation", "preactivation", "error", "weight", "gradient", "momentum")
"""Kinds of stored tensors."""

WEIGHT_KINDS = ("weight", "gradient", "momentum")
"""Kinds of tensors [O, R, S, I]."""

EPS, NORM_MOMENTUM = 1e-5, 0.1

_convolution_backward = torch.ops.aten.convolution_backward


@dataclass(frozen=True)
class StudyFormat:
    """Policies by kind of tensor.

    Parameters
    ----------
    policies : mapping of str to Policy or None
        By `KINDS`; None, or no entry: plain FP32.
    targets : mapping of str to Targets
        For kinds whose policies are dynamic.

    Raises
    ------
    ValueError
        If a kind is unknown, or has targets but no policy.
    """

    policies: Mapping[str, Policy | None] = field(default_factory=dict)
    targets: Mapping[str, Targets] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in (*self.policies, *self.targets):
            if kind not in KINDS:
                raise ValueError(f"kinds of tensors are {', '.join(KINDS)}, not {kind!r}")
        if missing := [kind for kind in self.targets if self.policies.get(kind) is None]:
            raise ValueError(f"{missing[0]} has targets but no policy")


FP32 = StudyFormat()
"""No quantisation at all."""


@dataclass
class State:
    """What training changes.

    Attributes
    ----------
    parameters, momenta : dict
        FP32 tensors by name: weights [O, R, S, I], vectors [C].
    running : dict
        Running mean and variance by batch norm.
    weights : dict
        Weights as they are read back from memory, by layer.
    formats : dict
        What the controller has chosen for the next time that a tensor is stored.
    """

    parameters: dict[str, torch.Tensor]
    momenta: dict[str, torch.Tensor]
    running: dict[str, tuple[torch.Tensor, torch.Tensor]]
    weights: dict[str, torch.Tensor]
    formats: dict[str, ControllerState] = field(default_factory=dict)


def from_nchw(x: "NDArray[np.float32] | torch.Tensor") -> torch.Tensor:
    """[N, C, H, W] (or [O, I, R, S]) as a contiguous tensor with the channels last."""
    return torch.as_tensor(x).permute(0, 2, 3, 1).contiguous()


def to_nchw(x: torch.Tensor) -> torch.Tensor:
    """The view [N, C, H, W] of a tensor with the channels last."""
    return x.permute(0, 3, 1, 2)


def initial_state(graph: Graph, parameters: Mapping[str, NDArray[np.float32]], formats: StudyFormat) -> State:
    """State before the first step, from the parameters of `golden.network.initial_parameters`."""
    tensors = {
        name: from_nchw(value) if value.ndim == 4 else torch.from_numpy(value.copy())
        for name, value in parameters.items()
    }
    running = {
        name: (torch.zeros_like(gamma), torch.ones_like(gamma))
        for name, gamma in ((key.removesuffix(".gamma"), value) for key, value in tensors.items() if ".gamma" in key)
    }
    policy = formats.policies.get("weight")
    weights = {name: store(value, policy)[0] for name, value in tensors.items() if value.ndim == 4}
    momenta = {name: torch.zeros_like(value) for name, value in tensors.items()}
    return State(tensors, momenta, running, weights)


@dataclass
class _Norm:
    """Statistics and coefficients of a batch norm: docs/training.md."""

    inv_count: torch.Tensor
    mean: torch.Tensor
    invstd: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


Observer = Callable[[str, str, torch.Tensor, Stored], None]
"""Called with the name, kind, values read back and statistics of every tensor that is stored."""


class Emulation:
    """A network, its formats, and the operations of a training step.

    Parameters
    ----------
    graph : Graph
        Its last node must be linear.
    formats : StudyFormat
    momentum, decay : float
        SGD; the decay is for weights only.

    Attributes
    ----------
    observer : callable or None
        Gets to see everything that is stored. Only then are blocks of weights those of the chip's memory (where the
        input channels of the first layer are padded besides).
    """

    def __init__(self, graph: Graph, formats: StudyFormat, *, momentum: float = 0.9, decay: float = 0.0) -> None:
        if not graph.nodes or not isinstance(graph.nodes[-1], Linear):
            raise ValueError("the last node of a network must be linear")
        self.graph, self.formats, self.momentum, self.decay = graph, formats, momentum, decay
        self.stages = fuse(graph)
        self.observer: Observer | None = None
        self._relu = {stage.name for stage in self.stages if isinstance(stage, GroupStage) and stage.relu}
        self._overflow = False

    # Storing.

    def policy(self, state: State, name: str, kind: str) -> Policy | None:
        """The policy with which tensor `name` is stored next; None: plain FP32."""
        policy = self.formats.policies.get(kind)
        if policy is not None and kind in self.formats.targets and name in state.formats:
            chosen = state.formats[name]
            policy = replace(policy, scale=chosen.scale, lo_bits=chosen.lo, hi_bits=chosen.hi)
        return policy

    def _store(
        self, state: State, name: str, kind: str, x: torch.Tensor, *, frozen: bool = False, **formula: Any
    ) -> torch.Tensor:
        """Store a formula of x as tensor `name`; what is read back. `frozen`: the controller takes no notice."""
        policy = self.policy(state, name, kind)
        if self.observer is not None and kind in WEIGHT_KINDS:
            # In the order of memory: kernel taps, input channels, output channels.
            values, stored = store(x.permute(1, 2, 3, 0).contiguous(), policy)
            values = values.permute(3, 0, 1, 2).contiguous()
            if "out" in formula:
                values = formula["out"].copy_(values)
        else:
            values, stored = store(x, policy, **formula)
        if policy is not None and not frozen and kind in self.formats.targets:
            before = ControllerState(policy.scale, policy.lo_bits, policy.hi_bits)
            state.formats[name] = adapt(before, stored.statistics(), self.formats.targets[kind])
        self._overflow |= stored.nonfinite
        if self.observer is not None:
            self.observer(name, kind, values, stored)
        return values

    def _encode(self, name: str, kind: str, x: torch.Tensor) -> torch.Tensor:
        """A tensor that the host encodes, with the static policy."""
        values, stored = store(x, self.formats.policies.get(kind))
        self._overflow |= stored.nonfinite
        if self.observer is not None:
            self.observer(name, kind, values, stored)
        return values

    # Feed-forward.

    def forward(
        self, state: State, images: torch.Tensor, *, training: bool = True
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        """Feed-forward of normalised images [N, H, W, C].

        In inference (not `training`) running statistics are used, and nothing changes `state`.

        Returns
        -------
        logits : float32 tensor [N, classes]
        tensors : dict
            Every stored output.
        saved : dict
            What `backward` needs beside.
        """
        tensors = {"images": self._encode("images", "activation", images)}
        sums: dict[str, torch.Tensor] = {}
        saved: dict[str, Any] = {}
        logits = images
        for stage in self.stages:
            x = tensors[stage.x]
            match stage:
                case ConvStage(name=name):
                    y = _convolution(x, state.weights[name], stage.node)
                    s = torch.empty(2, y.shape[-1], dtype=torch.float64) if stage.norm and training else None
                    if stage.norm and s is not None:
                        sums[stage.norm] = s
                    tensors[name] = self._store(state, name, "preactivation", y, out=y, sums=s, frozen=not training)
                case LinearStage(name=name):
                    logits = x.flatten(1) @ state.weights[name].flatten(1).T + state.parameters[f"{name}.bias"]
                case PoolStage(name=name):
                    pooled, winner = _pool(x, stage.node)
                    tensors[name] = self._store(state, name, "activation", pooled, frozen=not training)
                    saved[name] = winner
                case GroupStage(name=name):
                    formula: dict[str, Any] = {"rectify": stage.relu, "frozen": not training}
                    if stage.other is not None:
                        formula |= {"form": "sum", "y": tensors[stage.other]}
                    if stage.norm is not None:
                        s = sums.pop(stage.norm, None)
                        if training and s is None:
                            s = channel_sums(x, x)
                        norm = saved[stage.norm] = self._norm(state, stage.norm, s, x.numel() // x.shape[-1])
                        formula |= {"form": "affine", "vectors": (norm.a, norm.b)}
                    tensors[name] = self._store(state, name, "activation", x, **formula)
        return logits, tensors, saved

    def _norm(self, state: State, name: str, sums: torch.Tensor | None, count: int) -> _Norm:
        """Coefficients from the sums of y and y y, or in inference (None) from the running statistics."""
        gamma, beta = state.parameters[f"{name}.gamma"], state.parameters[f"{name}.beta"]
        inv_count = torch.tensor(1.0) / torch.tensor(float(count))
        if sums is None:
            mean, var = state.running[name]
        else:
            s1, s2 = sums.to(torch.float32)
            mean = s1 * inv_count
            var = (s2 * inv_count - mean * mean).clamp_min(0)
        invstd = 1 / torch.sqrt(var + EPS)
        a = gamma * invstd
        b = beta - mean * a
        if sums is not None:
            unbiased = var * (count / (count - 1) if count > 1 else 1.0)
            state.running[name] = (
                state.running[name][0] * (1 - NORM_MOMENTUM) + mean * NORM_MOMENTUM,
                state.running[name][1] * (1 - NORM_MOMENTUM) + unbiased * NORM_MOMENTUM,
            )
        return _Norm(inv_count, mean, invstd, a, b)

    # Back-propagation and weight gradients.

    def backward(
        self, state: State, tensors: dict[str, torch.Tensor], saved: dict[str, Any], error: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """Gradients, times the loss scale, from the gradient [N, classes] of the logits.

        Returns
        -------
        gradients : dict
            By parameter.
        overflow : bool
            A stored element or a gradient was infinite or NaN.
        """
        self._overflow = False
        last = self.stages[-1].name
        errors = {last: self._encode(f"d.{last}", "error", error[:, None, None, :].contiguous())}
        gradients: dict[str, torch.Tensor] = {}
        for stage in reversed(self.stages):
            if stage.name not in errors:
                self._error(state, stage.name, tensors, saved, errors)
            e = errors[stage.name]
            match stage:
                case GroupStage(norm=str(norm), x=x):
                    statistics = saved[norm]
                    s1, s2 = channel_sums(e, tensors[x]).to(torch.float32)
                    dgamma = (s2 - statistics.mean * s1) * statistics.invstd
                    g1, g2 = dgamma * statistics.inv_count, s1 * statistics.inv_count
                    b = 0 - statistics.a * statistics.invstd * g1
                    c = 0 - (statistics.a * g2 + b * statistics.mean)
                    gradients[f"{norm}.gamma"], gradients[f"{norm}.beta"] = dgamma, s1
                    vectors = (statistics.a, b, c)
                    errors[x] = self._store(
                        state, f"d.{x}", "error", e, form="norm_gradient", y=tensors[x], vectors=vectors
                    )
                case ConvStage(name=name, x=x):
                    g = _weight_gradient(tensors[x], e, state.weights[name], stage.node)
                    gradients[name] = self._store(state, f"g.{name}", "gradient", g, out=g)
                case LinearStage(name=name, x=x):
                    g = (e.flatten(1).T @ tensors[x].flatten(1)).reshape(state.weights[name].shape)
                    gradients[name] = self._store(state, f"g.{name}", "gradient", g, out=g)
                    gradients[f"{name}.bias"] = e.sum((0, 1, 2), dtype=torch.float64).to(torch.float32)
        vectors_finite = all(bool(torch.isfinite(g).all()) for g in gradients.values() if g.ndim == 1)
        return gradients, self._overflow or not vectors_finite

    def _error(
        self,
        state: State,
        name: str,
        tensors: dict[str, torch.Tensor],
        saved: dict[str, Any],
        errors: dict[str, torch.Tensor],
    ) -> None:
        """Error of stored tensor `name`, from its uses."""
        groups, pools, products = [], [], []
        for stage in reversed(self.stages):
            match stage:
                case GroupStage() if name == stage.other or (name == stage.x and stage.norm is None):
                    groups.append(stage)
                case PoolStage() if name == stage.x:
                    pools.append(stage)
                case ConvStage() | LinearStage() if name == stage.x:
                    products.append(stage)
        x = tensors[name]
        mask = x if name in self._relu else None
        alone = len(groups) + len(pools) + len(products) == 1
        terms = [errors[stage.name] for stage in groups]
        for stage in pools:
            e = _pool_backward(errors[stage.name], saved[stage.name], x.shape, stage.node)
            target = f"d.{name}" if alone else f"d.{name}.{stage.name}"
            terms.append(self._store(state, target, "error", e, out=e, mask=mask if alone else None))
        if alone and terms and (pools or mask is None):
            errors[name] = terms[0]
            return
        total = terms[0] if terms else None
        for term in terms[1:]:
            assert total is not None
            total = total + term
        for index, stage in enumerate(products):
            part = _input_gradient(errors[stage.name], x, state.weights[stage.name], stage.node)
            formula: dict[str, Any] = {} if total is None else {"form": "sum", "y": total}
            last = index == len(products) - 1
            target = f"d.{name}" if last else f"d.{name}.{stage.name}"
            total = self._store(state, target, "error", part, out=part, mask=mask if last else None, **formula)
        if not products:
            assert total is not None
            total = self._store(state, f"d.{name}", "error", total, mask=mask)
        assert total is not None
        errors[name] = total

    # Update, and all of it.

    def update(self, state: State, gradients: Mapping[str, torch.Tensor], rate: float, loss_scale: float) -> None:
        """Update the state in place from the gradients."""
        for name, value in state.parameters.items():
            momentum = state.momenta[name]
            momentum_update(
                value,
                momentum,
                gradients[name],
                rate=rate,
                momentum=self.momentum,
                decay=self.decay if value.ndim == 4 else 0.0,
                inv_loss_scale=1.0 / loss_scale,
            )
            if value.ndim == 4:
                if self.formats.policies.get("momentum") is not None:
                    self._store(state, f"momentum.{name}", "momentum", momentum, out=momentum)
                state.weights[name] = self._store(state, f"w.{name}", "weight", value)

    def loss(self, logits: torch.Tensor, labels: NDArray[np.int64], loss_scale: float) -> tuple[float, torch.Tensor]:
        """What the host computes: the mean loss, and its gradient times the loss scale [N, classes]."""
        loss, gradient = loss_and_gradient(logits.numpy(), labels)
        return loss, torch.from_numpy(gradient * np.float32(loss_scale))


def _convolution(x: torch.Tensor, weight: torch.Tensor, node: Conv) -> torch.Tensor:
    y = torch.nn.functional.conv2d(to_nchw(x), to_nchw(weight), stride=node.stride, padding=node.padding)
    return y.permute(0, 2, 3, 1).contiguous()


def _gradients(
    e: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, node: Conv, *, of_input: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stride, padding = [node.stride] * 2, [node.padding] * 2
    return _convolution_backward(
        to_nchw(e), to_nchw(x), to_nchw(weight), None, stride, padding, [1, 1], False, [0, 0], 1,
        [of_input, not of_input, False],
    )  # fmt: skip


def _input_gradient(e: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, node: Conv | Linear) -> torch.Tensor:
    if isinstance(node, Linear):
        return (e.flatten(1) @ weight.flatten(1)).reshape(x.shape)
    return _gradients(e, x, weight, node, of_input=True)[0].permute(0, 2, 3, 1).contiguous()


def _weight_gradient(x: torch.Tensor, e: torch.Tensor, weight: torch.Tensor, node: Conv) -> torch.Tensor:
    return _gradients(e, x, weight, node, of_input=False)[1].permute(0, 2, 3, 1).contiguous()


def _pool(x: torch.Tensor, node: MaxPool | GlobalAveragePool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The pooled tensor, and where a maximum came from."""
    if isinstance(node, GlobalAveragePool):
        pixels = x.shape[1] * x.shape[2]
        inverse = torch.tensor(1.0) / torch.tensor(float(pixels))
        return x.sum((1, 2), keepdim=True, dtype=torch.float64).to(torch.float32) * inverse, None
    values, winner = torch.nn.functional.max_pool2d(
        to_nchw(x).contiguous(), node.kernel, node.stride, node.padding, return_indices=True
    )
    return from_nchw(values), winner


def _pool_backward(
    e: torch.Tensor, winner: torch.Tensor | None, shape: torch.Size, node: MaxPool | GlobalAveragePool
) -> torch.Tensor:
    if winner is None:
        inverse = torch.tensor(1.0) / torch.tensor(float(shape[1] * shape[2]))
        return (e * inverse).expand(shape).contiguous()
    n, h, w, c = shape
    flat = torch.zeros(n, c, h * w).scatter_add_(2, winner.flatten(2), to_nchw(e).flatten(2))
    return from_nchw(flat.reshape(n, c, h, w))
