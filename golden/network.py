"""A whole training step of a network: feed-forward, loss, back-propagation, weight gradients, update.

Follows docs/training.md step by step; every tensor that the chip leaves in memory is in the result under its name
there: outputs by their node's name, "d.NAME" their errors, "w.NAME" and "g.NAME" weights and their gradients,
"master.NAME" and "momentum.NAME" the FP32 copies (the momentum Quantised if it has a format), "BN.mean" and so on the
per-channel vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden import vector
from golden.controller import ControllerState, Statistics, Targets, adapt, statistics_of
from golden.conv import conv2d_input_grad_sums, conv2d_sums, conv2d_weight_grad_sums
from golden.exact import ExactSum, exact_dot_sum, round_sum
from golden.fgmp import FP16_POLICY, Policy, Quantised, fgmp, quantize, to_fp16
from golden.linear import linear_input_grad_sums, linear_sums, linear_weight_grad_sums

__all__ = ["Formats", "Hyperparameters", "Layer", "Network", "State", "StepResult", "initial_parameters", "resnet18"]

F32 = NDArray[np.float32]
_F16_ONE = np.uint16(0x3C00)
_INDEX = Policy.between(0.0, 16.0)
"""Of tap indices: FP8 up to 16, which holds them all, else FP16."""
_OPS = ("conv", "batch_norm", "add", "relu", "max_pool", "global_average_pool", "linear")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A node of a network.

    Parameters
    ----------
    name : str
    op : str
        "conv", "batch_norm", "add", "relu", "max_pool", "global_average_pool" or "linear".
    inputs : tuple of str
        Names of nodes, or "images".
    outputs, kernel, stride, padding : int
        Of convolutions, poolings and linear layers.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: int = 0
    kernel: int = 1
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        if self.op not in _OPS:
            raise ValueError(f"op must be one of {', '.join(_OPS)}, not {self.op!r}")


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Policy of each kind of tensor."""

    activation: Policy = FP16_POLICY
    preactivation: Policy = FP16_POLICY
    error: Policy = FP16_POLICY
    weight: Policy = FP16_POLICY
    gradient: Policy = FP16_POLICY
    momentum: Policy | None = None
    """Of the momenta of weights; None: they stay FP32."""


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Of SGD with momentum, and of batch norm."""

    rate: float
    momentum: float = 0.9
    decay: float = 0.0
    loss_scale: float = 1.0
    eps: float = 1e-5
    norm_momentum: float = 0.1


@dataclass
class State:
    """What training changes.

    Attributes
    ----------
    parameters, momenta : dict
        FP32, by name.
    running : dict
        Running mean and variance by batch norm.
    weights : dict
        Weights as they are in memory, by layer.
    formats : dict
        What the dynamic ratio controller has chosen for the next time that a tensor is stored, by its name.
    statistics : dict
        What it has chosen that from: the elements of the tensor, without those that fill up its blocks.
    """

    parameters: dict[str, F32]
    momenta: dict[str, F32]
    running: dict[str, tuple[F32, F32]]
    weights: dict[str, Quantised]
    formats: dict[str, ControllerState] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)


@dataclass
class StepResult:
    """Everything a step left in memory, by name: Quantised (NCHW, weights OIHW) or float32 vectors; and the loss."""

    tensors: dict[str, Any]
    loss: float
    overflow: bool = False
    """An error or gradient was stored that is infinite or NaN."""


@dataclass
class _Group:
    """A pointwise group (docs/training.md)."""

    name: str
    x: str
    norm: str | None = None
    other: str | None = None
    relu: bool = False


@dataclass
class Network:
    """A network of layers in topological order; the last is linear.

    Parameters
    ----------
    layers : sequence of Layer
    formats : Formats
    settings : Hyperparameters
    targets : mapping of str to Targets
        For kinds whose policies are dynamic: what the controller steers to. `formats` is what they start from.
    """

    layers: Sequence[Layer]
    formats: Formats
    settings: Hyperparameters
    targets: Mapping[str, Targets] = field(default_factory=dict)
    _by_name: dict[str, Layer] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {layer.name: layer for layer in self.layers}
        if len(self._by_name) != len(self.layers):
            raise ValueError("names of layers must be unique")
        if not self.layers or self.layers[-1].op != "linear":
            raise ValueError("the last layer must be linear")
        for layer in self.layers:
            users = [user.name for user in self._uses(layer.inputs[0])]
            if layer.op == "batch_norm" and len(users) > 1:
                raise ValueError(f"the input of {layer.name} must have no other use, not {', '.join(users)}")
        self._groups = self._find_groups()

    def _uses(self, name: str) -> list[Layer]:
        return [layer for layer in self.layers if name in layer.inputs]

    def _find_groups(self) -> dict[str, _Group]:
        """Groups by the name of their last layer."""
        groups: dict[str, _Group] = {}
        open_group: dict[str, _Group] = {}  # by the name of the layer that is last so far
        for layer in self.layers:
            if layer.op not in ("batch_norm", "add", "relu"):
                continue
            before = open_group.get(layer.inputs[0])
            joins = (
                before is not None
                and layer.op != "batch_norm"
                and not before.relu
                and not (layer.op == "add" and before.other is not None)
                and len(self._uses(before.name)) == 1
                and layer.inputs.count(before.name) == 1
            )
            if joins and before is not None:
                del open_group[before.name]
                group = before
            else:
                group = _Group(layer.name, layer.inputs[0])
            group.name = layer.name
            if layer.op == "batch_norm":
                group.norm = layer.name
            elif layer.op == "add":
                group.other = layer.inputs[1]
            else:
                group.relu = True
            open_group[layer.name] = group
        for group in open_group.values():
            groups[group.name] = group
        return groups

    # Feed-forward.

    def initial_state(self, parameters: Mapping[str, F32]) -> State:
        """State before the first step: momenta zero, running mean 0 and variance 1."""
        running = {
            layer.name: (
                np.zeros_like(parameters[f"{layer.name}.gamma"]),
                np.ones_like(parameters[f"{layer.name}.gamma"]),
            )
            for layer in self.layers
            if layer.op == "batch_norm"
        }
        momenta = {name: np.zeros_like(value) for name, value in parameters.items()}
        weights = {name: self._encode(value, "weight") for name, value in parameters.items() if value.ndim == 4}
        return State({name: value.copy() for name, value in parameters.items()}, momenta, running, weights)

    def _encode(self, values: F32, kind: str) -> Quantised:
        """A tensor that the host encodes."""
        return fgmp(values, getattr(self.formats, kind))

    def _policy(self, state: State, name: str, kind: str) -> Policy:
        """The policy with which tensor `name` is stored this time."""
        policy: Policy = getattr(self.formats, kind)
        if kind in self.targets and name in state.formats:
            chosen = state.formats[name]
            policy = replace(policy, scale=chosen.scale, lo_bits=chosen.lo, hi_bits=chosen.hi)
        return policy

    def _store(self, state: State, name: str, kind: str, values: F32) -> Quantised:
        """A tensor that the chip stores; its statistics go to the controller."""
        policy = self._policy(state, name, kind)
        bits = to_fp16(values, policy.scale)
        kept, codes, underflow = quantize(bits, policy)
        if kind in self.targets:
            before = ControllerState(policy.scale, policy.lo_bits, policy.hi_bits)
            statistics = state.statistics[name] = statistics_of(bits, codes, underflow)
            state.formats[name] = adapt(before, statistics, self.targets[kind])
        return Quantised(kept, codes, policy.scale, underflow)

    def _round(self, state: State, name: str, kind: str, sums: ExactSum, scale: int) -> Quantised:
        """Sums of products at scale `scale`, rounded to FP16 at the scale of tensor `name`, before FGMP."""
        policy = self._policy(state, name, kind)
        bits = round_sum(sums, scale - policy.scale, "fp16")
        kept, codes, underflow = quantize(bits, FP16_POLICY)
        return Quantised(kept, codes, policy.scale, underflow)

    def forward(self, state: State, images: F32, *, training: bool = True) -> tuple[dict[str, Any], dict]:
        """Feed-forward of normalised images [N, C, H, W].

        Returns
        -------
        tensors : dict
            Every stored output, the vectors of batch norms, and the logits under the last layer's name.
        saved : dict
            What `backward` needs beside: statistics by batch norm, winners by max pooling, weights by layer.
        """
        settings = self.settings
        tensors: dict[str, Any] = {"images": self._encode(np.asarray(images, np.float32), "activation")}
        saved: dict = {"statistics": {}, "winner": {}, "weight": {}}
        before_fgmp: dict[str, Quantised] = {}
        for layer in self.layers:
            name = layer.name
            if layer.op in ("conv", "linear"):
                saved["weight"][name] = weight = state.weights[name]
                x = tensors[layer.inputs[0]]
            if layer.op == "conv":
                sums = conv2d_sums(x, weight, stride=layer.stride, padding=layer.padding)
                plain = self._round(state, name, "preactivation", sums, x.scale + weight.scale)
                before_fgmp[name] = plain
                tensors[name] = self._store(state, name, "preactivation", plain.values())
            elif layer.op == "linear":
                flat = _flat(x)
                sums = linear_sums(flat, _flat(weight))
                logits = round_sum(sums, x.scale + weight.scale, "fp32")
                tensors[name] = vector.add(logits, state.parameters[f"{name}.bias"])
            elif layer.op == "max_pool":
                x = tensors[layer.inputs[0]]
                values, winner = vector.max_pool(x.values(), layer.kernel, layer.stride, layer.padding)
                tensors[name] = self._store(state, name, "activation", values)
                saved["winner"][name] = winner
                tensors[f"{name}.winner"] = fgmp(winner.astype(np.float32), _INDEX)
            elif layer.op == "global_average_pool":
                pooled = vector.global_average_pool(tensors[layer.inputs[0]])
                tensors[name] = self._store(state, name, "activation", pooled[:, :, None, None])
            elif layer.op == "batch_norm":
                source = layer.inputs[0]
                gamma, beta = state.parameters[f"{name}.gamma"], state.parameters[f"{name}.beta"]
                if training:
                    y = before_fgmp.get(source, tensors[source])
                    statistics = vector.batch_norm_statistics(y, gamma, beta, settings.eps)
                    state.running[name] = vector.running_statistics(
                        *state.running[name], statistics, settings.norm_momentum
                    )
                    saved["statistics"][name] = statistics
                    a, b = statistics.a, statistics.b
                    tensors[f"{name}.mean"], tensors[f"{name}.invstd"] = statistics.mean, statistics.invstd
                else:
                    _, a, b = vector.batch_norm_coefficients(*state.running[name], gamma, beta, settings.eps)
                tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"] = state.running[name]
                tensors[f"{name}.a"], tensors[f"{name}.b"] = a, b
            if name in self._groups:
                tensors[name] = self._group_forward(state, self._groups[name], tensors)
        return tensors, saved

    def _group_forward(self, state: State, group: _Group, tensors: dict) -> Quantised:
        z = tensors[group.x].values()
        if group.norm is not None:
            z = vector.batch_norm_apply(z, tensors[f"{group.norm}.a"], tensors[f"{group.norm}.b"])
        if group.other is not None:
            z = vector.add(z, tensors[group.other].values())
        if group.relu:
            z = vector.relu(z)
        return self._store(state, group.name, "activation", z)

    # Back-propagation and weight gradients.

    def backward(self, state: State, tensors: dict, saved: dict, error: Quantised) -> None:
        """Errors and gradients from the encoded error [N, classes, 1, 1] of the logits, added to `tensors`."""
        tensors[f"d.{self.layers[-1].name}"] = error
        # Errors as the next operations see them: where a tensor's error is another's, it is not stored again.
        errors: dict[str, Quantised] = {self.layers[-1].name: error}
        for layer in reversed(self.layers):
            name = layer.name
            stored = layer.op not in ("batch_norm", "add", "relu") or name in self._groups
            if not stored:
                continue
            if name not in errors:
                self._error(state, name, tensors, saved, errors)
            e = errors[name]
            if name in self._groups and self._groups[name].norm is not None:
                group = self._groups[name]
                y = tensors[group.x]
                gradients = vector.batch_norm_backward(e, y, saved["statistics"][group.norm])
                tensors[f"g.{group.norm}.gamma"] = gradients.dgamma
                tensors[f"g.{group.norm}.beta"] = gradients.dbeta
                tensors[f"{group.norm}.grad_b"], tensors[f"{group.norm}.grad_c"] = gradients.b, gradients.c
                tensors[f"d.{group.x}"] = errors[group.x] = self._store(state, f"d.{group.x}", "error", gradients.dy)
            if layer.op == "conv":
                x = tensors[layer.inputs[0]]
                sums = conv2d_weight_grad_sums(
                    x, e, kernel_shape=(layer.kernel, layer.kernel), stride=layer.stride, padding=layer.padding
                )
                plain = self._round(state, f"g.{name}", "gradient", sums, x.scale + e.scale)
                tensors[f"g.{name}"] = self._store(state, f"g.{name}", "gradient", plain.values())
            elif layer.op == "linear":
                x = tensors[layer.inputs[0]]
                sums = linear_weight_grad_sums(_flat(x), _flat(e))
                plain = self._round(state, f"g.{name}", "gradient", sums, x.scale + e.scale)
                gradient = self._store(state, f"g.{name}", "gradient", plain.values())
                tensors[f"g.{name}"] = _reshape(gradient, (*gradient.shape, 1, 1))
                bias = exact_dot_sum(e.bits, _F16_ONE, (0, 2, 3))
                tensors[f"g.{name}.bias"] = round_sum(bias, e.scale, "fp32")

    def _error(self, state: State, name: str, tensors: dict, saved: dict, errors: dict[str, Quantised]) -> None:
        """Error of stored tensor `name`, from its uses."""
        mask = tensors[name].values() if name in self._groups and self._groups[name].relu else None
        groups = [
            group for group in self._groups.values() if name == group.other or (name == group.x and group.norm is None)
        ]
        order = {layer.name: index for index, layer in enumerate(self.layers)}
        groups.sort(key=lambda group: -order[group.name])
        pools = [layer for layer in reversed(self._uses(name)) if layer.op in ("max_pool", "global_average_pool")]
        products = [layer for layer in reversed(self._uses(name)) if layer.op in ("conv", "linear")]
        alone = len(groups) + len(pools) + len(products) == 1

        def masked(e: F32) -> F32:
            return e if mask is None else vector.relu_backward(e, mask)

        terms = [errors[group.name] for group in groups]
        for pool in pools:
            e = self._pool_backward(pool, tensors[name].shape, errors[pool.name], saved)
            target = f"d.{name}" if alone else f"d.{name}.{pool.name}"
            tensors[target] = stored = self._store(state, target, "error", masked(e) if alone else e)
            terms.append(stored)
        if alone and pools:
            errors[name] = terms[0]
            return
        if alone and terms and mask is None:
            errors[name] = terms[0]
            return
        if alone and products:
            sums, scale = self._product_backward(products[0], tensors[name].shape, errors, saved)
            plain = self._round(state, f"d.{name}", "error", sums, scale)
            tensors[f"d.{name}"] = errors[name] = self._store(state, f"d.{name}", "error", masked(plain.values()))
            return
        total: F32 | None = None
        for term in terms:
            total = term.values() if total is None else vector.add(total, term.values())
        for index, layer in enumerate(products):
            sums, scale = self._product_backward(layer, tensors[name].shape, errors, saved)
            part = round_sum(sums, scale, "fp32")
            total = part if total is None else vector.add(total, part)
            if index < len(products) - 1:
                target = f"d.{name}.{layer.name}"
                tensors[target] = self._store(state, target, "error", total)
                total = tensors[target].values()
        if total is None:
            raise ValueError(f"nothing uses {name}")
        tensors[f"d.{name}"] = errors[name] = self._store(state, f"d.{name}", "error", masked(total))

    def _product_backward(
        self, layer: Layer, shape: tuple[int, ...], errors: dict[str, Quantised], saved: dict
    ) -> tuple[ExactSum, int]:
        """Sums of the input error of a convolution or linear layer, and their scale."""
        e, weight = errors[layer.name], saved["weight"][layer.name]
        if layer.op == "conv":
            sums = conv2d_input_grad_sums(e, weight, input_shape=shape, stride=layer.stride, padding=layer.padding)
        else:
            sums = linear_input_grad_sums(_flat(e), _flat(weight)).reshape(shape)
        return sums, e.scale + weight.scale

    @staticmethod
    def _pool_backward(layer: Layer, shape: tuple[int, ...], e: Quantised, saved: dict) -> F32:
        if layer.op == "global_average_pool":
            return vector.global_average_pool_backward(e.values()[:, :, 0, 0], shape)
        winner = saved["winner"][layer.name]
        return vector.max_pool_backward(e.values(), winner, shape, layer.kernel, layer.stride, layer.padding)

    # Update, and all of it.

    def update(self, state: State, tensors: dict, loss_scale: float | None = None) -> None:
        """Update the state from the gradients in `tensors`; the new copies are added to `tensors`."""
        settings = self.settings
        loss_scale = settings.loss_scale if loss_scale is None else loss_scale
        for name, value in state.parameters.items():
            gradient = tensors[f"g.{name}"]
            is_weight = isinstance(gradient, Quantised)
            value, momentum = vector.sgd_step(
                value,
                state.momenta[name],
                gradient.values() if isinstance(gradient, Quantised) else gradient,
                lr=settings.rate,
                momentum=settings.momentum,
                weight_decay=settings.decay if is_weight else 0.0,
                inv_loss_scale=1.0 / loss_scale,
            )
            state.parameters[name], state.momenta[name] = value, momentum
            tensors[f"master.{name}"], tensors[f"momentum.{name}"] = value, momentum
            if is_weight and self.formats.momentum is not None:
                stored = tensors[f"momentum.{name}"] = self._store(state, f"momentum.{name}", "momentum", momentum)
                state.momenta[name] = stored.values()
            if is_weight:
                tensors[f"w.{name}"] = state.weights[name] = self._store(state, f"w.{name}", "weight", value)

    def loss_error(
        self, logits: F32, labels: NDArray[np.int64], loss_scale: float | None = None
    ) -> tuple[float, Quantised]:
        """What the host computes: the loss, and the encoded error of the logits."""
        loss, gradient = vector.loss_and_gradient(logits, labels)
        scaled = vector.mul(gradient, np.float32(self.settings.loss_scale if loss_scale is None else loss_scale))
        return loss, self._encode(scaled[:, :, None, None], "error")

    def train_step(
        self, state: State, images: F32, labels: NDArray[np.int64], *, loss_scale: float | None = None
    ) -> StepResult:
        """One training step; `state` is changed.

        Parameters
        ----------
        images : float32 array [N, C, H, W]
        labels : int64 array [N]
        loss_scale : float or None
            Of this step; there is then no update if an error or gradient overflows. None: that of the settings, and
            always an update.
        """
        tensors, saved = self.forward(state, images)
        logits = tensors[self.layers[-1].name]
        assert isinstance(logits, np.ndarray)
        loss, error = self.loss_error(logits, labels, loss_scale)
        before = set(tensors)
        self.backward(state, tensors, saved, error)
        overflow = any(
            bool(((value.bits & np.uint16(0x7C00)) == 0x7C00).any())
            for name, value in tensors.items()
            if name not in before and isinstance(value, Quantised) and value is not error
        )
        if loss_scale is None or not overflow:
            self.update(state, tensors, loss_scale)
        return StepResult(tensors, loss, overflow)


def _reshape(x: Quantised, shape: tuple[int, ...]) -> Quantised:
    return Quantised(x.bits.reshape(shape), x.codes.reshape(shape), x.scale, x.underflow.reshape(shape))


def _flat(x: Quantised) -> Quantised:
    """[N, C, 1, 1] as [N, C]."""
    return _reshape(x, x.shape[:2])


def initial_parameters(layers: Sequence[Layer], channels: int, seed: int = 0) -> dict[str, F32]:
    """He-normal weights, gamma 1, beta and bias 0; `channels` of the images."""
    rng = np.random.default_rng(seed)
    width = {"images": channels}
    parameters: dict[str, F32] = {}
    for layer in layers:
        inputs = width[layer.inputs[0]]
        width[layer.name] = layer.outputs or inputs
        if layer.op in ("conv", "linear"):
            shape = (layer.outputs, inputs, layer.kernel, layer.kernel)
            deviation = np.sqrt((2.0 if layer.op == "conv" else 1.0) / (inputs * layer.kernel**2))
            parameters[layer.name] = (rng.standard_normal(shape) * deviation).astype(np.float32)
        if layer.op == "linear":
            parameters[f"{layer.name}.bias"] = np.zeros(layer.outputs, np.float32)
        if layer.op == "batch_norm":
            parameters[f"{layer.name}.gamma"] = np.ones(inputs, np.float32)
            parameters[f"{layer.name}.beta"] = np.zeros(inputs, np.float32)
    return parameters


def resnet18(*, width: int = 64, classes: int = 10, stem: str = "cifar") -> list[Layer]:
    """ResNet-18 (He et al. 2015, table 1) with `width` channels in its first stage.

    Parameters
    ----------
    stem : {"cifar", "imagenet"}
        A 3x3 convolution, or a 7x7 of stride 2 and a max pooling.
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem must be cifar or imagenet, not {stem!r}")
    layers: list[Layer] = []

    def add(op: str, name: str, *inputs: str, **numbers: int) -> str:
        layers.append(Layer(name=name, op=op, inputs=inputs, **numbers))
        return name

    kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
    x = add("conv", "stem.conv", "images", outputs=width, kernel=kernel, stride=stride, padding=kernel // 2)
    x = add("relu", "stem.relu", add("batch_norm", "stem.bn", x))
    if stem == "imagenet":
        x = add("max_pool", "stem.pool", x, kernel=3, stride=2, padding=1)
    inputs = width
    for stage, outputs in enumerate((width, 2 * width, 4 * width, 8 * width), start=1):
        for number in range(2):
            block = f"layer{stage}.{number}"
            stride = 2 if stage > 1 and number == 0 else 1
            y = add("conv", f"{block}.conv1", x, outputs=outputs, kernel=3, stride=stride, padding=1)
            y = add("relu", f"{block}.relu1", add("batch_norm", f"{block}.bn1", y))
            y = add("conv", f"{block}.conv2", y, outputs=outputs, kernel=3, padding=1)
            y = add("batch_norm", f"{block}.bn2", y)
            if stride != 1 or inputs != outputs:
                x = add("conv", f"{block}.down.conv", x, outputs=outputs, stride=stride)
                x = add("batch_norm", f"{block}.down.bn", x)
            x = add("relu", f"{block}.relu2", add("add", f"{block}.add", y, x))
            inputs = outputs
    x = add("global_average_pool", "pool", x)
    add("linear", "fc", x, outputs=classes)
    return layers
