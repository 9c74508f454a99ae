"""golden.network against PyTorch: a training step with FP16 tensors is one in FP32 but for rounding.

What rounding does is taken from PyTorch too: a second FP32 network has its stored tensors and their errors rounded to
FP16. In a shallow network the golden model agrees with that one nearly exactly; in a deep one, where a rounding that
flips a ReLU changes every gradient below, both are about as far from plain FP32.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from golden.fgmp import Quantised
from golden.network import Formats, Hyperparameters, Layer, Network, initial_parameters, resnet18
from lnpu.compiler.graph import GroupStage, fuse
from verif.tests.test_compiler import NETWORKS, golden_layers

torch = pytest.importorskip("torch")

SETTINGS = Hyperparameters(rate=0.05, momentum=0.9, decay=1e-2, loss_scale=64.0)


class Round(torch.autograd.Function):
    """Rounds a tensor to FP16, and so its gradient times the loss scale."""

    @staticmethod
    def forward(context, x, scale):
        context.scale = scale
        return x.half().float()

    @staticmethod
    def backward(context, gradient):
        return (gradient * context.scale).half().float() / context.scale, None


class TorchNetwork:
    """The same layers in PyTorch, float32 with autograd; what is `stored` is rounded to FP16."""

    def __init__(
        self,
        layers: list[Layer],
        parameters: dict[str, NDArray[np.float32]],
        settings: Hyperparameters,
        stored: set[str],
    ) -> None:
        self.layers, self.settings, self.stored = layers, settings, stored
        self.parameters = {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()}
        self.running = {
            layer.name: (torch.zeros(len(gamma)), torch.ones(len(gamma)))
            for layer in layers
            if layer.op == "batch_norm"
            for gamma in [parameters[f"{layer.name}.gamma"]]
        }
        weights = [value for value in self.parameters.values() if value.ndim == 4]
        vectors = [value for value in self.parameters.values() if value.ndim == 1]
        groups = [{"params": weights, "weight_decay": settings.decay}, {"params": vectors}]
        self.optimiser = torch.optim.SGD(groups, lr=settings.rate, momentum=settings.momentum)

    def forward(self, images: NDArray[np.float32]) -> dict[str, "torch.Tensor"]:
        """Every layer's output; gradients are kept."""
        functional = torch.nn.functional
        p = {name: self._round(name, value) for name, value in self.parameters.items()}
        out = {"images": self._round("images", torch.tensor(images, requires_grad=True))}
        out["images"].retain_grad()
        for layer in self.layers:
            x, name = out[layer.inputs[0]], layer.name
            at = {"stride": layer.stride, "padding": layer.padding}
            if layer.op == "conv":
                y = functional.conv2d(x, p[name], **at)
            elif layer.op == "batch_norm":
                affine = p[f"{name}.gamma"], p[f"{name}.beta"]
                y = functional.batch_norm(
                    x, *self.running[name], *affine, True, self.settings.norm_momentum, self.settings.eps
                )
            elif layer.op == "add":
                y = x + out[layer.inputs[1]]
            elif layer.op == "relu":
                y = functional.relu(x)
            elif layer.op == "max_pool":
                y = functional.max_pool2d(x, layer.kernel, **at)
            elif layer.op == "global_average_pool":
                y = x.mean((2, 3), keepdim=True)
            else:
                y = functional.linear(x.flatten(1), p[name].flatten(1), p[f"{name}.bias"])
            out[name] = self._round(name, y)
            out[name].retain_grad()
        return out

    def _round(self, name: str, x: "torch.Tensor") -> "torch.Tensor":
        return Round.apply(x, self.settings.loss_scale) if name in self.stored else x

    def train_step(self, images: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, dict]:
        """Loss and outputs."""
        self.optimiser.zero_grad()
        out = self.forward(images)
        loss = torch.nn.functional.cross_entropy(out[self.layers[-1].name], torch.tensor(labels))
        loss.backward()
        self.optimiser.step()
        return loss.item(), out


def distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Distance of two tensors, relative to the second."""
    norm = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / norm) if norm else float(np.linalg.norm(a) > 0)


def masked_error(net: Network, name: str, out: dict[str, "torch.Tensor"]) -> "torch.Tensor":
    """What "d.NAME" stands for: the gradient of NAME, where it is the output of a ReLU that of the ReLU's input."""
    gradient = out[name].grad.reshape(out[name].shape)
    layer = next((layer for layer in net.layers if layer.name == name), None)
    if layer is not None and layer.op == "relu":
        gradient = gradient * (out[name] > 0)
    return gradient


class Comparison:
    """A step of the golden model, of PyTorch in FP32, and of that with FP16 rounding.

    Attributes
    ----------
    tensors : dict
        By name, as float64: the golden model's, plain FP32, rounded FP32. Errors and gradients have the loss scale;
        "master.NAME" is how far the parameter moved.
    losses : list of float
    """

    def __init__(self, layers: list[Layer], channels: int, images: NDArray, labels: NDArray) -> None:
        net = Network(layers, Formats(), SETTINGS)
        parameters = initial_parameters(layers, channels, 1)
        result = net.train_step(net.initial_state(parameters), images, labels)
        names = {layer.name for layer in layers[:-1]} | {"images"}
        weights = {name for name, value in parameters.items() if value.ndim == 4}
        self.losses, twins = [result.loss], []
        for stored in (set(), (names & set(result.tensors)) | weights):
            twin = TorchNetwork(layers, parameters, SETTINGS, stored)
            loss, out = twin.train_step(images, labels)
            self.losses.append(loss)
            twins.append((twin, out))
        self.tensors = {}
        for name, value in result.tensors.items():
            others = [self._of(net, *twin, parameters, name) for twin in twins]
            if others[0] is None:
                continue
            ours = value.values() if isinstance(value, Quantised) else value
            if name.startswith("master."):
                ours = ours - parameters[name.partition(".")[2]]
            parts = (ours, *(other.detach().numpy() for other in others))
            self.tensors[name] = tuple(np.asarray(part, np.float64).ravel() for part in parts)

    @staticmethod
    def _of(net: Network, twin: TorchNetwork, out: dict, parameters: dict, name: str) -> "torch.Tensor | None":
        """PyTorch's tensor of this name."""
        kind, _, rest = name.partition(".")
        if name in out:
            return out[name]
        if kind == "d" and rest in out:
            return masked_error(net, rest, out) * SETTINGS.loss_scale
        if kind == "g":
            return twin.parameters[rest].grad * SETTINGS.loss_scale
        if kind == "master":
            return twin.parameters[rest] - torch.tensor(parameters[rest])
        if name.endswith((".running_mean", ".running_var")):
            return twin.running[name.rpartition(".")[0]][name.endswith("var")]
        return None


def some_images(channels: int, height: int, width: int, batch: int, classes: int, seed: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, channels, height, width)).astype(np.float32)
    return images, rng.integers(0, classes, batch)


@pytest.mark.parametrize("stem, channels, image, batch", [("cifar", 1, 8, 16), ("imagenet", 3, 32, 12)])
def test_step_of_resnet18(stem: str, channels: int, image: int, batch: int) -> None:
    layers = resnet18(width=8, stem=stem)
    step = Comparison(layers, channels, *some_images(channels, image, image, batch, 10, 5))
    assert max(step.losses) - min(step.losses) < 2e-3 * step.losses[1]
    gradients = [name for name in step.tensors if name.startswith("g.")]
    assert (
        len(gradients) == sum(name.startswith("master.") for name in step.tensors) == 62
    )  # 21 weights, 20 norms, bias
    assert sum(name.startswith("d.") for name in step.tensors) > 35
    outputs = {layer.name for layer in layers}
    worst = {}
    for name, (ours, plain, rounded) in step.tensors.items():
        cosine = ours @ plain / np.linalg.norm(ours) / np.linalg.norm(plain)
        assert cosine > (0.9999 if name in outputs else 0.9), f"{name}: {cosine}"
        far, as_far = distance(ours, plain), distance(rounded, plain)
        worst[name] = round(far / max(as_far, 1e-6), 2)
        assert far < 4 * as_far + 1e-4, f"{name}: {far} from FP32, but with rounding only {as_far}"
    print(sorted(worst.items(), key=lambda item: -item[1])[:5])


@pytest.mark.parametrize("name", NETWORKS)
def test_step_of_other_networks(name: str) -> None:
    graph = NETWORKS[name]()
    images, labels = some_images(graph.channels, graph.height, graph.width, 8, graph.shapes["fc"][0], 2)
    step = Comparison(golden_layers(graph), graph.channels, images, labels)
    assert max(step.losses) - min(step.losses) < 2e-3 * step.losses[1]
    far = {name: distance(ours, rounded) for name, (ours, _, rounded) in step.tensors.items()}
    print(sorted(far.items(), key=lambda item: -item[1])[:5])
    assert max(far.values()) < 2e-3


def test_steps_follow_torch() -> None:
    """Ten steps on the same images: the loss goes down as PyTorch's does."""
    graph = NETWORKS["two max pools"]()
    layers = golden_layers(graph)
    images, labels = some_images(graph.channels, graph.height, graph.width, 8, 3, 4)
    parameters = initial_parameters(layers, graph.channels, 1)
    net, twin = Network(layers, Formats(), SETTINGS), TorchNetwork(layers, parameters, SETTINGS, set())
    state = net.initial_state(parameters)
    losses = np.array(
        [(net.train_step(state, images, labels).loss, twin.train_step(images, labels)[0]) for _ in range(10)]
    )
    print(losses.round(4).tolist())
    assert losses[-1, 0] < 0.75 * losses[0, 0]
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=0.02)


def test_initial_parameters() -> None:
    """He-normal weights, the same for the same seed."""
    layers = resnet18(width=16)
    first, again, other = (initial_parameters(layers, 3, seed) for seed in (4, 4, 5))
    assert first.keys() == again.keys() == other.keys()
    for name, value in first.items():
        assert value.dtype == np.float32 and (value == again[name]).all()
        if value.ndim == 4:
            assert (value != other[name]).mean() > 0.9
            inputs, gain = np.prod(value.shape[1:]), 1 if name == "fc" else 2
            deviation = np.sqrt(gain / inputs)
            assert abs(value.std() / deviation - 1) < 5 / np.sqrt(value.size), name
        else:
            assert (value == name.endswith(".gamma")).all()
    assert first["stem.conv"].shape == (16, 3, 3, 3) and first["fc"].shape == (10, 128, 1, 1)


def test_state() -> None:
    """The initial state owns its parameters; a step changes the state, inference does not."""
    layers = golden_layers(NETWORKS["two max pools"]())
    parameters = initial_parameters(layers, 2)
    kept = {name: value.copy() for name, value in parameters.items()}
    net = Network(layers, Formats(), SETTINGS)
    state = net.initial_state(parameters)
    images, labels = some_images(2, 11, 9, 2, 3, 0)
    net.forward(state, images, training=False)
    assert all((mean == 0).all() and (var == 1).all() for mean, var in state.running.values())
    net.train_step(state, images, labels)
    assert all((parameters[name] == kept[name]).all() for name in kept)
    assert not any((state.parameters[name] == kept[name]).all() for name in kept)
    assert not any((mean == 0).all() for mean, _ in state.running.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_groups(name: str) -> None:
    """The golden model and the compiler find the same pointwise groups, each by its own means."""
    graph = NETWORKS[name]()
    groups = Network(golden_layers(graph), Formats(), SETTINGS)._groups.values()
    found = {(g.name, g.x, g.norm, g.other, g.relu) for g in groups}
    assert found == {(s.name, s.x, s.norm, s.other, s.relu) for s in fuse(graph) if isinstance(s, GroupStage)}


def test_groups_of_resnet18() -> None:
    groups = Network(resnet18(), Formats(), SETTINGS)._groups
    assert len(groups) == 1 + 8 * 2 + 3
    last = groups["layer4.0.relu2"]
    assert (last.x, last.norm, last.other, last.relu) == ("layer4.0.conv2", "layer4.0.bn2", "layer4.0.down.bn", True)
    assert (groups["layer4.0.down.bn"].other, groups["layer4.0.down.bn"].relu) == (None, False)


@pytest.mark.parametrize(
    "layers, message",
    [
        ([], "the last layer must be linear"),
        ([Layer(name="r", op="relu", inputs=("images",))], "the last layer must be linear"),
        ([Layer(name="f", op="linear", inputs=("images",), outputs=1)] * 2, "names of layers must be unique"),
    ],
)
def test_networks_that_are_none(layers: list[Layer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(layers, Formats(), SETTINGS)
    with pytest.raises(ValueError, match=r"op must be one of conv, .*, not 'gelu'"):
        Layer(name="g", op="gelu", inputs=("images",))
    with pytest.raises(ValueError, match="stem must be cifar or imagenet, not 'none'"):
        resnet18(stem="none")
