"""The emulated training step against the golden model, stage by stage, and the sizes against its encoder."""

from dataclasses import replace

import numpy as np
import pytest

import golden.network
from golden.controller import ControllerState, adapt
from golden.fgmp import CODE_FP8, FP16_POLICY, Policy, fgmp
from golden.memory import TensorLayout
from golden.network import Hyperparameters, Network, initial_parameters
from lnpu.compiler.graph import Graph, resnet18
from lnpu.compiler.policies import STUDY_TARGETS
from verif.tests.test_compiler import NETWORKS, golden_layers

torch = pytest.importorskip("torch")

from lnpu.study.emulation import FP32, Emulation, StudyFormat, from_nchw, initial_state  # noqa: E402
from lnpu.study.kernels import PADDINGS, store  # noqa: E402
from lnpu.study.runs import get_study_format  # noqa: E402

SETTINGS = Hyperparameters(rate=0.05, momentum=0.9, decay=1e-2, loss_scale=256.0)


class Fed(Emulation):
    """Compares every stage with the golden model's, and goes on with that one's results.

    Attributes
    ----------
    expected : dict
        Tensors of the golden model's step.
    elements, differing : int
        Elements compared, and those that FP32 sums made another number.
    """

    def expect(self, expected: dict) -> None:
        self.expected, self.elements, self.differing, self.seen = expected, 0, 0, set()

    def _store(self, state, name, kind, x, **formula):
        policy = self.policy(state, name, kind)
        values = super()._store(state, name, kind, x, **formula)
        quantised = self.expected[name]
        assert quantised.scale == policy.scale, name
        wanted = from_nchw(quantised.values())
        # What rounds the other way is the neighbouring number, in FP16 or FP8, or crosses a limit.
        coarse = bool((quantised.codes == CODE_FP8).any()) or policy.below == "zero"
        step, least = (2.0**-3, 2.0**-9) if coarse else (2.0**-10, 2.0**-24)
        if policy.below == "zero":
            least = max(least, policy.lo)
        largest = torch.maximum(values.abs(), wanted.abs())
        assert bool(((values - wanted).abs() <= step * largest + least * 2.0**policy.scale).all()), name
        self.seen.add(name)
        self.elements += wanted.numel()
        self.differing += int((values != wanted).sum())
        return values.copy_(wanted)

    def _encode(self, name, kind, x):
        values = super()._encode(name, kind, x)
        np.testing.assert_array_equal(values, from_nchw(self.expected[name].values()))
        self.seen.add(name)
        return values

    def _norm(self, state, name, sums, count):
        norm = super()._norm(state, name, sums, count)
        vectors = {key: self.expected[f"{name}.{key}"] for key in ("mean", "invstd", "a", "b")}
        for key, vector in vectors.items():  # sums over elements that FP32 sums may have rounded the other way
            atol = 1e-4 * np.abs(vector).max()
            np.testing.assert_allclose(getattr(norm, key), vector, rtol=1e-4, atol=atol, err_msg=f"{name}.{key}")
        return replace(norm, **{key: torch.from_numpy(vector.copy()) for key, vector in vectors.items()})


def check_steps(graph: Graph, formats: StudyFormat, batch: int, steps: int) -> None:
    """Training steps of both, every stage with the golden model's operands."""
    layers = golden_layers(graph)
    network = Network(layers, golden.network.Formats(**formats.policies), SETTINGS, formats.targets)
    parameters = initial_parameters(layers, graph.channels, 3)
    state = network.initial_state(parameters)
    fed = Fed(graph, formats, momentum=SETTINGS.momentum, decay=SETTINGS.decay)
    twin = initial_state(graph, parameters, formats)
    for layer, weight in state.weights.items():
        np.testing.assert_array_equal(twin.weights[layer], from_nchw(weight.values()))
    rng = np.random.default_rng(4)
    for _ in range(steps):
        images = rng.standard_normal((batch, graph.channels, graph.height, graph.width)).astype(np.float32)
        labels = rng.integers(0, graph.shapes[graph.nodes[-1].name][0], batch)
        result = network.train_step(state, images, labels)
        fed.expect(result.tensors)
        last = graph.nodes[-1].name
        logits, tensors, saved = fed.forward(twin, from_nchw(images))
        np.testing.assert_allclose(logits, result.tensors[last], rtol=1e-4, atol=1e-4)
        loss, error = fed.loss(torch.from_numpy(result.tensors[last]), labels, SETTINGS.loss_scale)
        assert loss == result.loss
        gradients, overflow = fed.backward(twin, tensors, saved, error)
        assert not overflow
        for parameter, gradient in gradients.items():
            if gradient.ndim == 1:
                wanted = result.tensors[f"g.{parameter}"]
                np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
                gradient.copy_(torch.from_numpy(wanted))
        fed.update(twin, gradients, SETTINGS.rate, SETTINGS.loss_scale)
        for parameter, value in state.parameters.items():
            both = (twin.parameters[parameter], value), (twin.momenta[parameter], state.momenta[parameter])
            for ours, golden_ in both:
                np.testing.assert_array_equal(ours, from_nchw(golden_) if golden_.ndim == 4 else golden_)
        # Everything that memory holds was compared, and the controller has decided alike.
        quantised = {key for key, value in result.tensors.items() if hasattr(value, "codes")}
        assert fed.seen == {key for key in quantised if not key.endswith(".winner")}
        assert fed.differing <= 2 + 0.004 * fed.elements
        assert twin.formats == state.formats


@pytest.mark.parametrize("name", ["fp16", "fp8", "fgmp", "dynamic"])
def test_step_of_resnet18(name):
    check_steps(resnet18(width=4, channels=3, image=8, classes=10), get_study_format(name), batch=4, steps=2)


@pytest.mark.parametrize("network", NETWORKS)
def test_step_of_other_networks(network):
    formats = get_study_format("dynamic")
    momentum = Policy.between(2.0**-6, 64.0, below="fp8")
    check_steps(NETWORKS[network](), replace(formats, policies=formats.policies | {"momentum": momentum}), 3, 2)


def test_inference_changes_nothing():
    graph = resnet18(width=4, channels=1, image=8, classes=10)
    formats = get_study_format("dynamic")
    network = Emulation(graph, formats)
    state = initial_state(graph, initial_parameters(golden_layers(graph), 1), formats)
    images = torch.randn(6, 8, 8, 1, generator=torch.Generator().manual_seed(0))
    network.forward(state, images)
    chosen, running = dict(state.formats), {key: tuple(value) for key, value in state.running.items()}
    logits = network.forward(state, images, training=False)[0]
    assert state.formats == chosen
    assert all(torch.equal(a, b) for key in running for a, b in zip(running[key], state.running[key], strict=True))
    # Each image by itself gives the same, but for the order of FP32 sums.
    alone = torch.cat([network.forward(state, images[i : i + 1], training=False)[0] for i in range(len(images))])
    assert torch.allclose(logits, alone, rtol=0.05, atol=0.02)


def test_fp32_is_plain_training():
    """Without quantisation gradients are those of autograd."""
    graph = NETWORKS["three paths"]()
    state = initial_state(graph, initial_parameters(golden_layers(graph), graph.channels), FP32)
    network = Emulation(graph, FP32)
    rng = np.random.default_rng(1)
    images = rng.standard_normal((5, graph.height, graph.width, graph.channels)).astype(np.float32)
    labels = rng.integers(0, graph.shapes["fc"][0], 5)
    _, tensors, saved = network.forward(state, torch.from_numpy(images))
    logits = network.forward(state, torch.from_numpy(images))[0]
    gradients, overflow = network.backward(state, tensors, saved, network.loss(logits, labels, 1.0)[1])
    assert not overflow
    h = 1e-2
    for name in ("c1", "fc"):
        direction = torch.from_numpy(rng.standard_normal(gradients[name].shape).astype(np.float32))
        direction /= direction.norm()
        losses = []
        for sign in (1, -1):
            state.weights[name] = state.parameters[name] + sign * h * direction
            losses.append(network.loss(network.forward(state, torch.from_numpy(images))[0], labels, 1.0)[0])
        state.weights[name] = state.parameters[name]
        slope = float((gradients[name] * direction).sum())
        assert abs((losses[0] - losses[1]) / (2 * h) - slope) < 0.02 * abs(slope) + 1e-3


@pytest.mark.parametrize("dynamic", [False, True])
def test_momentum_format(dynamic):
    """The update uses the momentum before it is rounded, the next one what is read back."""
    graph = NETWORKS["convolutions alone"]()
    policy = Policy.between(2.0**-6, 4.0, scale=-6, below="fp8")
    targets = STUDY_TARGETS["dynamic"]["gradient"]
    formats = StudyFormat({"momentum": policy}, {"momentum": targets} if dynamic else {})
    network = Emulation(graph, formats, momentum=0.9)
    state = initial_state(graph, initial_parameters(golden_layers(graph), graph.channels), formats)
    rng = np.random.default_rng(2)
    w, m = state.parameters["c1"].clone(), state.momenta["c1"].clone()
    chosen = policy
    for _ in range(4):
        gradients = {
            name: torch.from_numpy(rng.standard_normal(value.shape).astype(np.float32))
            for name, value in state.parameters.items()
        }
        network.update(state, gradients, 0.5, 1.0)
        exact = m * np.float32(0.9) + gradients["c1"]
        w = w - exact * np.float32(0.5)
        m, stored = store(exact, chosen)
        assert torch.equal(state.momenta["c1"], m) and torch.equal(state.parameters["c1"], w)
        assert not torch.equal(m, exact)
        if dynamic:
            after = adapt(ControllerState(chosen.scale, chosen.lo_bits, chosen.hi_bits), stored.statistics(), targets)
            assert state.formats["momentum.c1"] == after
            chosen = replace(chosen, scale=after.scale, lo_bits=after.lo, hi_bits=after.hi)
    # Vectors have no format.
    assert torch.equal(network._encode("x", "momentum", w), store(w, policy)[0])
    with pytest.raises(ValueError):
        StudyFormat({}, {"momentum": targets})


@pytest.mark.parametrize("shape", [(5, 7, 3), (4, 9, 16), (3, 5, 24), (6, 2, 64), (2, 3, 100), (4, 1, 256), (1, 1, 1)])
@pytest.mark.parametrize("zeros", [0.0, 0.4, 1.0])
def test_encoded_size(shape, zeros):
    """Blocks and their bytes are those of the encoder, with any padding."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal(shape).astype(np.float32) * (rng.random(shape) >= zeros)
    layout = TensorLayout(*shape, beat=4)
    for policy in (FP16_POLICY, Policy.between(2.0**-3, 1.0, below="zero"), Policy.between(0.0, 448.0)):
        stored = store(torch.from_numpy(x.astype(np.float32)), policy)[1]
        lengths = layout.lengths(fgmp(x.astype(np.float32), policy).codes).astype(np.int64)
        assert stored.blocks == layout.blocks
        assert stored.blocks + 8 * stored.masked + stored.precision + stored.payload == lengths.sum()
        assert stored.padded == tuple(int((-(-lengths // unit) * unit).sum()) for unit in PADDINGS)
