"""The compiler, on the executable specification of the commands: no RTL, every element and code against the golden model."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

import golden
import golden.network
from golden.conv import conv2d_input_grad_sums, conv2d_sums, conv2d_weight_grad_sums
from golden.exact import ExactSum, round_sum
from golden.fgmp import CODE_PADDING, Policy, Quantised, fgmp, quantize
from lnpu.compiler import graph as nodes
from lnpu.compiler.convolution import Convolution, Rounding, lower_forward, lower_input_grad, lower_weight_grad
from lnpu.compiler.graph import Graph, fuse, resnet18
from lnpu.compiler.layers import Optimiser, Workspace
from lnpu.compiler.policies import FORMATS
from lnpu.compiler.program import Program, Region
from lnpu.compiler.tensor import MemoryMap, RawTensor, Tensor, padded_channels
from lnpu.compiler.tiles import Tile
from lnpu.compiler.training import Formats, TrainingStep
from lnpu.config import EDGE, PAPER, TINY, ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Command, Opcode, Unit
from lnpu.driver import Host, Trainer
from lnpu.formats import SLOT_BYTES, TensorKind
from lnpu.sim import Chip
from lnpu.train_step import compare
from verif.command_model import CommandModel

CONFIGS = {
    "tiny": TINY,
    "edge": EDGE,
    "four cores": TINY.replace(cores=4, lanes=4),
    "three cores": TINY.replace(cores=3, lanes=12, depth=32, rows=32, dense_rows=128, psum_rows=24, acc_bits=93),
    "depth 48": TINY.replace(cores=1, lanes=24, beat=8, depth=48, rows=32, psum_rows=32, dense_rows=64),
    "depth 128": TINY.replace(cores=1, lanes=128, depth=128, rows=128, psum_rows=256, acc_bits=128),
    "smallest": TINY.replace(cores=1, lanes=4, depth=16, rows=16, dense_rows=16, psum_rows=16, vmem_rows=400),
    "paper, 3 cores": PAPER.replace(cores=3),
}
POLICIES = {
    "fp16": Policy(),
    "fp8": Policy(0, 0, 0x7BFF, "fp16", "fp8"),
    "mixed": Policy.between(2.0**-6, 2.0, below="fp8"),
    "flushing": Policy.between(0.25, 1.0, below="zero", above="fp8"),
}


class ModelDevice:
    """A `Device` that is the command model."""

    def __init__(self, config: ChipConfig, memory_bytes: int) -> None:
        self.memory = np.zeros(memory_bytes, np.uint8)
        self.model = CommandModel(config, self.memory)

    def run_program(self, address: int, commands: int) -> dict[str, int]:
        """Run the program at `address`."""
        self.model.run(address)
        return {}


def values(rng: np.random.Generator, shape: tuple[int, ...], *, sparsity: float, special: bool) -> NDArray[np.float32]:
    """Normal numbers, a part of them zero; or random FP16 patterns with some subnormal, largest, infinite and NaN."""
    x = rng.normal(size=shape).astype(np.float32)
    if special:
        chosen = np.array([0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x8000, 0x7C00, 0xFC00, 0x7E00], np.uint16)
        odds = np.array([20, 20, 20, 20, 20, 20, 1, 1, 1]) / 123
        picked = rng.choice(chosen, shape, p=odds).view(np.float16).astype(np.float32)
        x = np.where(rng.random(shape) < 0.2, picked, x)
    return np.where(rng.random(shape) < sparsity, np.float32(0), x)


class ConvolutionJob:
    """One convolution in its three phases: operands in memory, one program, results against the golden model.

    Parameters
    ----------
    config : ChipConfig
    shape : Convolution
    policies : dict of str to Policy
        Of "x", "w", "dy" and the results "y", "dx", "dw".
    rng : numpy.random.Generator
    phases : str
        Which of "ff", "bp", "wg" the program runs.
    """

    def __init__(
        self,
        config: ChipConfig,
        shape: Convolution,
        policies: dict[str, Policy],
        rng: np.random.Generator,
        *,
        sparsity: float = 0.3,
        special: bool = False,
        saturate: bool = False,
        phases: tuple[str, ...] = ("ff", "bp", "wg"),
        memory_bytes: int = 1 << 24,
    ) -> None:
        self.config, self.shape, self.policies, self.saturate, self.phases = config, shape, policies, saturate, phases
        self.memory = np.zeros(memory_bytes, np.uint8)
        self.map = MemoryMap(size=memory_bytes, beat=config.beat, base=4096)
        s = shape
        inputs = {"images": s.batch, "height": s.height, "width": s.width, "channels": s.channels}
        outputs = {"images": s.batch, "height": s.out_height, "width": s.out_width, "channels": s.outputs}
        taps = s.kernel_height * s.kernel_width
        weights = {"height": taps, "width": padded_channels(s.channels, config.beat), "channels": s.outputs}
        self.tensors = {
            name: self.map.tensor(name, kind, **size, policy=policies[name])
            for name, kind, size in (
                ("x", TensorKind.ACTIVATION, inputs),
                ("w", TensorKind.WEIGHT, weights),
                ("dy", TensorKind.ERROR, outputs),
                ("y", TensorKind.ACTIVATION, outputs),
                ("dx", TensorKind.ERROR, inputs),
                ("dw", TensorKind.GRADIENT, weights),
            )
        }
        some = {"sparsity": sparsity, "special": special}
        self.weight_shape = (s.outputs, s.channels, s.kernel_height, s.kernel_width)
        self.operands = {
            "x": fgmp(values(rng, (s.batch, s.channels, s.height, s.width), **some), policies["x"]),
            "w": fgmp(values(rng, self.weight_shape, sparsity=0.0, special=special), policies["w"]),
            "dy": fgmp(values(rng, (s.batch, s.outputs, s.out_height, s.out_width), **some), policies["dy"]),
        }
        host = Host(config, self.memory)
        host.write(self.tensors["x"], self.operands["x"])
        host.write(self.tensors["dy"], self.operands["dy"])
        host.write_weight(self.tensors["w"], self.operands["w"])
        self.program = self._compile()
        self.address = self.map.allocate("the program", self.program.size, COMMAND_BYTES)
        self.memory[self.address : self.address + self.program.size] = np.frombuffer(self.program.encode(), np.uint8)

    def _compile(self) -> Program:
        program = Program(self.config)
        space = Workspace(program)
        t = self.tensors
        for phase, lower, first, second, name in (
            ("ff", lower_forward, t["x"], t["w"], "y"),
            ("bp", lower_input_grad, t["dy"], t["w"], "dx"),
            ("wg", lower_weight_grad, t["x"], t["dy"], "dw"),
        ):
            if phase not in self.phases:
                continue
            out = t[name]

            def store(tile: Tile, place: int, first: bool, scratch: list[int], out: Tensor = out) -> None:
                space.vectors.store(out, tile, place)

            rounding = Rounding(True, out.policy.scale, self.saturate)
            lower(program, self.shape, first, second, out, rounding, store, vmem=space.tiles, vmem_end=space.end)
        program.end()
        return program

    def sums(self, phase: str) -> tuple[str, ExactSum, int]:
        """Result's name, golden sums and their scale."""
        s, (x, w, dy) = self.shape, (self.operands[name] for name in ("x", "w", "dy"))
        at = {"stride": s.stride, "padding": s.padding}
        if phase == "ff":
            return "y", conv2d_sums(x, w, **at), x.scale + w.scale
        if phase == "bp":
            return "dx", conv2d_input_grad_sums(dy, w, input_shape=x.shape, **at), dy.scale + w.scale
        kernel = (s.kernel_height, s.kernel_width)
        return "dw", conv2d_weight_grad_sums(x, dy, kernel_shape=kernel, **at), x.scale + dy.scale

    def check(self, memory: NDArray[np.uint8]) -> None:
        """Compare the results in `memory` with the golden model, and the rest of it with what was there."""
        host = Host(self.config, memory)
        untouched = np.ones(len(memory), bool)
        for phase in self.phases:
            name, sums, scale = self.sums(phase)
            tensor, policy = self.tensors[name], self.policies[name]
            bits, codes, _ = quantize(round_sum(sums, scale - policy.scale, "fp16", self.saturate), policy)
            if phase == "wg":
                got = host.read_weight(tensor, self.weight_shape)
                assert not host.read(tensor).bits[:, :, :, self.shape.channels :].any(), "padding of dw"
            else:
                got = host.read(tensor)
            wrong = (got.bits != bits) | (got.codes != codes)
            assert not wrong.any(), f"{phase}: {wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"
            untouched[tensor.slots : tensor.slots + SLOT_BYTES * tensor.blocks] = False
            untouched[tensor.table : tensor.table + tensor.blocks] = False
        changed = np.flatnonzero(untouched & (memory != self.memory))
        assert not changed.size, f"writes outside the results, first at {changed[0]:#x}"


def random_shape(rng: np.random.Generator, most_macs: int, channels: tuple[int, ...]) -> Convolution:
    """Any convolution whose phases have at most `most_macs` multiply-accumulates."""
    while True:
        kernel = int(rng.choice([1, 1, 3, 3, 5, 7]))
        width = kernel if rng.random() < 0.6 else int(rng.choice([1, 2, 3, 5, 7]))
        n, h, w = (int(rng.integers(1, end)) for end in (4, 14, 14))
        c, o = (int(rng.choice(channels)) for _ in "co")
        stride, padding = int(rng.choice([1, 1, 2, 3])), int(rng.integers(0, 4))
        try:
            shape = Convolution(n, c, h, w, o, kernel, width, stride, padding)
        except ValueError:
            continue
        if shape.macs <= most_macs:
            return shape


def random_job(config: ChipConfig, seed: int, most_macs: int = 200_000, **options) -> ConvolutionJob:
    """A job with random shape, policies, scales and operands; prints what it is."""
    rng = np.random.default_rng(seed)
    channels = (1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 24, 33, 63, 64, 65, 70, 130)
    shape = random_shape(rng, most_macs, channels)
    names = {name: str(rng.choice(list(POLICIES))) for name in ("x", "w", "dy", "y", "dx", "dw")}
    policies = {name: POLICIES[policy].with_scale(int(rng.integers(-3, 4))) for name, policy in names.items()}
    options = {
        "sparsity": float(rng.choice([0.0, 0.3, 0.8, 1.0], p=[0.2, 0.4, 0.3, 0.1])),
        "special": bool(rng.random() < 0.2),
        "saturate": bool(rng.random() < 0.3),
    } | options
    print(f"seed {seed}: {shape}, {names}, {options}")
    return ConvolutionJob(config, shape, policies, rng, **options)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", CONFIGS)
def test_random_convolutions(name: str, seed: int) -> None:
    job = random_job(CONFIGS[name], 100 * list(CONFIGS).index(name) + seed)
    device = ModelDevice(CONFIGS[name], len(job.memory))
    device.memory[:] = job.memory
    device.run_program(job.address, len(job.program.commands))
    job.check(device.memory)


# Networks


def golden_layers(graph: Graph) -> list[golden.network.Layer]:
    """The golden model's layers of a graph."""
    operations = {
        nodes.Conv: "conv",
        nodes.BatchNorm: "batch_norm",
        nodes.Add: "add",
        nodes.Relu: "relu",
        nodes.MaxPool: "max_pool",
        nodes.GlobalAveragePool: "global_average_pool",
        nodes.Linear: "linear",
    }
    layers = []
    for node in graph.nodes:
        inputs = (node.x, node.other) if isinstance(node, nodes.Add) else (node.x,)
        numbers = {key: getattr(node, key) for key in ("outputs", "kernel", "stride", "padding") if hasattr(node, key)}
        layers.append(golden.network.Layer(name=node.name, op=operations[type(node)], inputs=inputs, **numbers))
    return layers


OPTIMISER = Optimiser(rate=0.05, momentum=0.9, decay=1e-2, loss_scale=256.0)


class Twins:
    """A network on a device and in the golden model, in the same state."""

    def __init__(
        self,
        graph: Graph,
        device: Callable[[int], "ModelDevice"],
        config: ChipConfig,
        *,
        batch: int,
        formats: Formats,
        seed: int = 0,
        optimiser: Optimiser = OPTIMISER,
        layers: list[golden.network.Layer] | None = None,
    ) -> None:
        self.step = TrainingStep(config, graph, batch=batch, formats=formats, optimiser=optimiser)
        kinds = ("activation", "preactivation", "error", "weight", "gradient")
        self.network = golden.network.Network(
            layers or golden_layers(graph),
            golden.network.Formats(**{kind: getattr(formats, kind) for kind in kinds}),
            golden.network.Hyperparameters(
                rate=optimiser.rate,
                momentum=optimiser.momentum,
                decay=optimiser.decay,
                loss_scale=optimiser.loss_scale,
            ),
        )
        parameters = golden.network.initial_parameters(self.network.layers, graph.channels, seed)
        self.state = self.network.initial_state(parameters)
        self.trainer = Trainer(self.step, device(-(-self.step.map.next // 4096) * 4096))
        self.trainer.load(parameters)

    def train(self, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
        """One step of both; every tensor must be equal. Returns the loss."""
        expected = self.network.train_step(self.state, images, labels)
        loss = self.trainer.train(images, labels)
        assert loss == expected.loss
        wrong = {name: count for name, count in compare(self.trainer, expected.tensors).items() if count[0]}
        assert not wrong, f"wrong elements, of: {wrong}"
        return loss

    def infer(self, images: NDArray[np.float32]) -> None:
        """Feed-forward with running statistics in both; logits must be equal."""
        tensors, _ = self.network.forward(self.state, images, training=False)
        logits = self.trainer.forward(images, training=False)
        np.testing.assert_array_equal(logits.view(np.uint32), tensors[self.network.layers[-1].name].view(np.uint32))


def batch_of(graph: Graph, batch: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Random images and labels."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, graph.channels, graph.height, graph.width)).astype(np.float32)
    return images, rng.integers(0, graph.shapes[graph.nodes[-1].name][0], batch)


def network_of(channels: int, height: int, width: int, *layers: nodes.Node, classes: int = 3) -> Graph:
    """A graph of these nodes, global average pooling and a linear layer."""
    graph = Graph("test", channels, height, width)
    last = "images"
    for node in layers:
        last = graph.add(node)
    graph.add(nodes.Linear("fc", graph.add(nodes.GlobalAveragePool("gap", last)), classes))
    return graph


Conv, BatchNorm, Add, Relu, MaxPool = nodes.Conv, nodes.BatchNorm, nodes.Add, nodes.Relu, nodes.MaxPool

NETWORKS: dict[str, Callable[[], Graph]] = {
    "no batch norm": lambda: network_of(
        2, 6, 5, Conv("c1", "images", 5, 3, 1, 1), Relu("r1", "c1"), Conv("c2", "r1", 9, 3, 2, 0), Relu("r2", "c2")
    ),
    "convolutions alone": lambda: network_of(1, 7, 7, Conv("c1", "images", 3, 5, 1, 2), Conv("c2", "c1", 4, 1, 3, 0)),
    "batch norm alone": lambda: network_of(1, 5, 5, Conv("c1", "images", 6, 3), BatchNorm("b1", "c1")),
    "batch norm after add": lambda: network_of(
        3,
        5,
        5,
        Conv("c1", "images", 8, 3, 1, 1),
        Conv("c2", "images", 8, 1),
        Add("sum", "c1", "c2"),
        BatchNorm("b", "sum"),
        Relu("r", "b"),
        Conv("c3", "r", 8, 3, 1, 1),
        Relu("r3", "c3"),
    ),
    "relu alone, its input added later": lambda: network_of(
        2,
        4,
        6,
        Conv("c1", "images", 4, 3, 1, 1),
        BatchNorm("b1", "c1"),
        Relu("r1", "b1"),
        Conv("c2", "r1", 4, 3, 1, 1),
        Add("sum", "c2", "b1"),
    ),
    "three paths": lambda: network_of(
        1,
        6,
        6,
        Conv("c1", "images", 8, 3, 1, 1),
        BatchNorm("b1", "c1"),
        Conv("c2", "images", 8, 1),
        Conv("c3", "images", 8, 5, 1, 2),
        BatchNorm("b3", "c3"),
        Add("s1", "b1", "c2"),
        Add("s2", "s1", "b3"),
        Relu("r", "s2"),
    ),
    "one input, many uses": lambda: network_of(
        1,
        6,
        6,
        Conv("c1", "images", 4, 3, 1, 1),
        Relu("r1", "c1"),
        Conv("c2", "r1", 4, 3, 1, 1),
        BatchNorm("b2", "c2"),
        Conv("c3", "r1", 4, 1),
        MaxPool("p", "r1", 3, 1, 1),
        Add("s1", "b2", "r1"),
        Add("s2", "c3", "s1"),
        Add("s3", "s2", "p"),
        Relu("r", "s3"),
    ),
    "second operand is the chain": lambda: network_of(
        1,
        5,
        5,
        Conv("c1", "images", 4, 3, 1, 1),
        Relu("r1", "c1"),
        Conv("c2", "r1", 4, 3, 1, 1),
        BatchNorm("b2", "c2"),
        Add("s", "r1", "b2"),
        Relu("r", "s"),
    ),
    "two max pools": lambda: network_of(
        2,
        11,
        9,
        Conv("c1", "images", 6, 3, 1, 1),
        BatchNorm("b1", "c1"),
        Relu("r1", "b1"),
        MaxPool("p1", "r1", 3, 2, 1),
        Conv("c2", "p1", 6, 3, 1, 1),
        MaxPool("p2", "c2", 2, 2),
        BatchNorm("b2", "p2"),
        Relu("r2", "b2"),
    ),
    "large windows": lambda: network_of(
        1, 12, 12, Conv("c1", "images", 4, 3, 1, 1), MaxPool("p1", "c1", 5, 3, 2), MaxPool("p2", "p1", 4, 1)
    ),
    "pool and sum of one tensor": lambda: network_of(
        1,
        4,
        4,
        Conv("c1", "images", 4, 3, 1, 1),
        MaxPool("p1", "c1", 3, 1, 1),
        MaxPool("p2", "c1", 1, 1),
        Add("s", "p1", "p2"),
        Add("t", "s", "c1"),
    ),
    "large masked tiles": lambda: network_of(
        8,
        8,
        8,
        Conv("c1", "images", 64, 1),
        Relu("r1", "c1"),
        Conv("c2", "r1", 64, 1),
        Conv("c3", "r1", 64, 1, 2),
        Conv("c4", "c2", 64, 1, 2),
        Add("s", "c3", "c4"),
        Relu("r", "s"),
    ),
    "over 64 channels": lambda: network_of(
        1, 3, 3, Conv("c1", "images", 70, 3, 1, 1), BatchNorm("b1", "c1"), Relu("r1", "b1"), classes=70
    ),
}


@pytest.mark.parametrize("formats", ["fp16", "fgmp"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, formats: str) -> None:
    graph, seed = NETWORKS[name](), list(NETWORKS).index(name)
    config = (TINY, CONFIGS["three cores"], CONFIGS["depth 48"])[seed % 3].replace(acc_bits=97, sum_rows=128)
    batch = 1 + seed % 4
    print(f"seed {seed}, batch {batch}, {config}")
    twins = Twins(graph, lambda size: ModelDevice(config, size), config, batch=batch, formats=FORMATS[formats])
    for step in range(2):
        twins.train(*batch_of(graph, batch, 10 * seed + step))
    twins.infer(batch_of(graph, batch, seed)[0])
