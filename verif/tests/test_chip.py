"""The whole chip in RTL, by programs of the compiler: bit for bit, with and without stalls, and what goes wrong."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

import golden
import golden.network
from golden.fgmp import CODE_FP8, CODE_FP16, CODE_ZERO, Policy
from lnpu.compiler.convolution import Convolution
from lnpu.compiler.graph import resnet18
from lnpu.compiler.layers import Optimiser
from lnpu.compiler.policies import FORMATS, TARGETS
from lnpu.compiler.tensor import padded_channels
from lnpu.compiler.traffic import predict_traffic
from lnpu.config import TINY, ChipConfig
from lnpu.ctrl.commands import Command, Opcode, Target, Unit, VectorOp
from lnpu.interfaces import Error
from lnpu.sim import Chip
from lnpu.sim.simulator import BusError, ChipError, Register, SimulationTimeout, Simulator
from verif.tests.test_compiler import (
    POLICIES,
    ConvolutionJob,
    Twins,
    batch_of,
    dynamic_network,
    random_job,
    random_shape,
    values,
)

CONFIGS = {
    "tiny": TINY,
    "odd": TINY.replace(
        name="odd",
        cores=3,
        lanes=12,
        depth=32,
        rows=32,
        dense_rows=128,
        psum_rows=24,
        acc_bits=93,
        vmem_rows=1000,
        sum_rows=40,
        address_bits=33,
        reads_in_flight=3,
        writes_in_flight=2,
        burst_beats=4,
    ),
    "wide": TINY.replace(
        name="wide", cores=1, lanes=16, beat=8, axi_bits=128, depth=72, vmem_rows=2048, burst_beats=64
    ),
}
MEMORY = 1 << 22


def simulate(job: ConvolutionJob, **options) -> Simulator:
    """Run the job in RTL and check its results; returns the simulator."""
    sim = Simulator(job.config, len(job.memory), **options)
    sim.memory[:] = job.memory
    sim.run_program(job.address, len(job.program.commands))
    job.check(sim.memory)
    return sim


def job_of(config: ChipConfig, shape: Convolution, policy: str = "fp16", seed: int = 0, **options) -> ConvolutionJob:
    """A job with one policy for all its tensors."""
    policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), POLICIES[policy])
    return ConvolutionJob(config, shape, policies, np.random.default_rng(seed), **options)


# Results


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", CONFIGS)
def test_random_convolutions(name: str, seed: int) -> None:
    """All phases in one program; any shape, policies, scales, sparsity, special values; half of them with stalls."""
    job = random_job(CONFIGS[name], 1000 + 100 * list(CONFIGS).index(name) + seed, most_macs=60_000)
    options = {} if seed % 2 else {"stall": 0.3, "latency": (1, 8, 60)[seed // 2 % 3], "seed": seed}
    print(options)
    simulate(job, **options)


@pytest.mark.parametrize(
    "shape",
    [
        Convolution(1, 1, 1, 1, 1, 1, 1),
        Convolution(1, 1, 1, 1, 1, 7, 7, 1, 3),
        Convolution(1, 3, 11, 11, 9, 7, 7, 2, 3),
        Convolution(2, 5, 7, 6, 3, 5, 5, 1, 2),
        Convolution(1, 5, 9, 8, 3, 2, 1, 3),
        Convolution(3, 130, 1, 1, 70, 1, 1),
        Convolution(65, 3, 1, 1, 5, 1, 1),
    ],
)
def test_corner_cases(shape: Convolution) -> None:
    """Far smaller than the array; kernels that see padding only; pixels without taps; over 64 channels and images."""
    simulate(job_of(TINY, shape, "mixed", special=True))


def test_padding_stays_zero() -> None:
    """Infinities and NaN in operands do not get into padding channels of the results (`job.check` looks at these)."""
    job = job_of(TINY, Convolution(3, 3, 9, 9, 5, 3, 3, 1, 1), special=True)
    assert all((~np.isfinite(job.operands[name].values())).sum() for name in ("x", "dy"))
    simulate(job)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("policy", ["fp16", "fp8"])
def test_all_dense_and_all_zero(policy: str, sparsity: float) -> None:
    simulate(job_of(CONFIGS["odd"], Convolution(2, 9, 6, 6, 17, 3, 3, 1, 1), policy, sparsity=sparsity))


@dataclass
class Operands:
    """Operands of a convolution, as arrays."""

    shape: Convolution
    x: NDArray[np.float32]
    w: NDArray[np.float32]
    dy: NDArray[np.float32]

    @classmethod
    def random(cls, rng: np.random.Generator, shape: Convolution, **options) -> "Operands":
        """See `values`."""
        s = shape
        sizes = (
            (s.batch, s.channels, s.height, s.width),
            (s.outputs, s.channels, s.kernel_height, s.kernel_width),
            (s.batch, s.outputs, s.out_height, s.out_width),
        )
        return cls(shape, *(values(rng, size, **options) for size in sizes))

    def run(self, library, phase: str, formats: tuple, **options) -> NDArray:
        """One phase by the functions of `golden` or of a `Chip`, which have the same arguments."""
        at = {"stride": self.shape.stride, "padding": self.shape.padding}
        first, second = formats
        if phase == "ff":
            return library.conv2d(self.x, self.w, x_format=first, w_format=second, **at, **options)
        if phase == "bp":
            return library.conv2d_input_grad(
                self.dy, self.w, input_shape=self.x.shape, dy_format=first, w_format=second, **at, **options
            )
        kernel = self.w.shape[2:]
        return library.conv2d_weight_grad(
            self.x, self.dy, kernel_shape=kernel, x_format=first, dy_format=second, **at, **options
        )

    def compare(self, chip: Chip, phase: str, formats: tuple, **options) -> None:
        """The chip's result, bit for bit; an FP16 zero has no sign in memory."""
        got, expected = (self.run(library, phase, formats, **options) for library in (chip, golden))
        if expected.dtype == np.float16:
            expected[expected == 0] = 0
        assert got.dtype == expected.dtype and got.shape == expected.shape
        np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), expected.view(f"u{got.itemsize}"))


def some_format(rng: np.random.Generator) -> str | Policy:
    """A name, or a policy with a scale."""
    if rng.random() < 0.5:
        return str(rng.choice(["fp16", "fp8"]))
    return POLICIES[str(rng.choice(list(POLICIES)))].with_scale(int(rng.integers(-20, 20)))


@pytest.mark.parametrize("name", CONFIGS)
def test_functions(name: str) -> None:
    """The functions of `lnpu.sim.Chip`: formats, scales, FP32 results, saturation, fully connected layers."""
    seed = list(CONFIGS).index(name)
    rng = np.random.default_rng(seed)
    chip = Chip(CONFIGS[name], memory_bytes=MEMORY, stall=0.1 * seed, latency=1 + 10 * seed)
    for number in range(9):
        shape = random_shape(rng, 10_000, (1, 2, 3, 5, 8, 13, 24, 65), CONFIGS[name].max_terms)
        formats = some_format(rng), some_format(rng)
        options = {
            "out": str(rng.choice(["fp16", "fp32"])),
            "out_scale": int(rng.integers(-30, 30)),
            "saturate": bool(rng.random() < 0.5),
        }
        phase = ("ff", "bp", "wg")[number % 3]
        if phase == "bp" and number > 1:  # some in the cores, some in the vector unit
            options["mask"] = rng.normal(size=(shape.batch, shape.channels, shape.height, shape.width))
            options["mask"] = options["mask"].astype(np.float16)
        print(f"seed {seed}, number {number}: {phase} {shape} {formats} {options}")
        operands = Operands.random(rng, shape, sparsity=0.3, special=bool(rng.random() < 0.5))
        operands.compare(chip, phase, formats, **options)
    x, w, dy = (rng.normal(size=size).astype(np.float16) for size in ((3, 20), (11, 20), (3, 11)))
    for function, operands in (("linear", (x, w)), ("linear_input_grad", (dy, w)), ("linear_weight_grad", (x, dy))):
        got, expected = (getattr(library, function)(*operands, out="fp32") for library in (chip, golden))
        np.testing.assert_array_equal(got, expected)


def test_special_values() -> None:
    """Infinity and NaN in both operands, by hand: streamed zeros are skipped, others are numbers."""
    inf, nan = np.inf, np.nan
    chip = Chip(TINY, memory_bytes=MEMORY)
    x = np.array([[0, 1], [-0.0, 1], [inf, 1], [-inf, 0], [nan, 0], [inf, inf]], np.float16)
    w = np.array([[inf, 1], [nan, 1], [0, 1], [1, -1], [-inf, inf]], np.float16)
    expected = [
        [1, 1, 1, -1, inf],
        [1, 1, 1, -1, inf],
        [inf, nan, nan, inf, nan],
        [-inf, nan, nan, -inf, inf],
        [nan, nan, nan, nan, nan],
        [inf, nan, nan, nan, nan],
    ]
    got = chip.linear(x, w)
    np.testing.assert_array_equal(got, np.array(expected, np.float16))
    assert (got.view(np.uint16)[np.isnan(got)] == 0x7E00).all()
    # The error of the loss is streamed in back-propagation, x in weight gradients.
    np.testing.assert_array_equal(
        chip.linear_input_grad(np.float16([[0, 2]]), np.float16([[inf, nan], [3, 0]])), [[6, 0]]
    )
    np.testing.assert_array_equal(chip.linear_weight_grad(np.float16([[0], [2]]), np.float16([[inf], [0.5]])), [[1]])
    np.testing.assert_array_equal(chip.linear_weight_grad(np.float16([[inf], [2]]), np.float16([[0], [1]])), [[nan]])


def test_extremes() -> None:
    """Subnormals, cancellation of the largest, overflow with and without saturation, results below FP16."""
    chip = Chip(TINY, memory_bytes=MEMORY)
    big, tiny = np.float16(65504), np.float16(2**-24)
    x = np.array([[big, tiny, -big]], np.float16)
    w = np.array([[big, tiny, big], [big, 0, 0], [0, tiny, 0], [tiny, 0, 0]], np.float16)
    exact = [2.0**-48, 65504.0**2, 2.0**-48, 65504 * 2.0**-24]
    np.testing.assert_array_equal(chip.linear(x, w, out="fp32"), np.array([exact], np.float32))
    np.testing.assert_array_equal(chip.linear(x, w), np.array([[0, np.inf, 0, exact[3]]], np.float16))
    np.testing.assert_array_equal(chip.linear(x, w, saturate=True), np.array([[0, big, 0, exact[3]]], np.float16))
    scaled = chip.linear(x, w, out_scale=-24)
    np.testing.assert_array_equal(scaled, np.array([[tiny, np.inf, tiny, 65504]], np.float16))


def test_flags() -> None:
    """FLAGS: a rounded result, and a stored element, that is not finite; cleared by writing ones."""
    chip = Chip(TINY, memory_bytes=MEMORY)
    one, big = np.full((1, 1), 1, np.float16), np.full((1, 1), 60000, np.float16)
    chip.linear(one, one)
    assert chip.device.read_register(Register.FLAGS) == 0
    chip.linear(big, big, out="fp32")
    assert chip.device.read_register(Register.FLAGS) == 0
    chip.linear(big, big)
    assert chip.device.read_register(Register.FLAGS) == 3
    chip.device.write_register(Register.FLAGS, 1)
    assert chip.device.read_register(Register.FLAGS) == 2
    chip.device.write_register(Register.FLAGS, 2)
    chip.linear(big, big, saturate=True)
    assert chip.device.read_register(Register.FLAGS) == 0


def test_stalls_change_nothing() -> None:
    """The same program under several kinds of stalls: other times, the same memory."""
    job = random_job(TINY, 77, most_macs=20_000, special=True)
    memories, cycles = [], []
    for options in (
        {},
        {"latency": 1},
        {"latency": 100},
        {"stall": 0.3, "seed": 1},
        {"stall": 0.3, "seed": 2},
        {"stall": 0.8, "seed": 3, "latency": 30},
    ):
        sim = simulate(job, **options)
        memories.append(sim.memory.copy())
        cycles.append(sim.counters()["cycles"])
    assert all((memory == memories[0]).all() for memory in memories)
    assert len(set(cycles)) == len(cycles)


# Counters


def visited(shape: Convolution, phase: str, codes: NDArray[np.uint8], code: int) -> int:
    """How many elements of this code the products of a phase meet, per output channel, from the definition."""
    rows, columns = (taps_of(shape, phase, axis) for axis in (0, 1))
    inside = (codes == code).sum(1)  # [N, H, W]
    return sum(
        int(
            inside[
                np.ix_(range(len(inside)), [i for i in row if i is not None], [j for j in column if j is not None])
            ].sum()
        )
        for row in rows
        for column in columns
    )


def taps_of(shape: Convolution, phase: str, axis: int) -> list[list[int | None]]:
    """For each tap of an axis that sees the source at all (WG: each), the source positions of the outputs."""
    size = (shape.height, shape.width)[axis]
    out = (shape.out_height, shape.out_width)[axis]
    kernel = (shape.kernel_height, shape.kernel_width)[axis]
    taps = []
    for r in range(kernel):
        if phase == "bp":
            hits = [h + shape.padding - r for h in range(size)]
            positions = [hit // shape.stride for hit in hits if hit % shape.stride == 0]
            limit = out
        else:
            positions = [h * shape.stride + r - shape.padding for h in range(out)]
            limit = size
        sources = [p if 0 <= p < limit else None for p in positions]
        if phase == "wg" or any(p is not None for p in sources):
            taps.append(sources)
    return taps


@pytest.mark.parametrize("phase", ["ff", "bp", "wg"])
@pytest.mark.parametrize("name", CONFIGS)
def test_counters_of_the_cores(name: str, phase: str) -> None:
    """Products, skipped zeros and skipped padding, from the operands alone."""
    config = CONFIGS[name]
    seed = 10 * list(CONFIGS).index(name) + len(phase)
    rng = np.random.default_rng(seed)
    shape = random_shape(rng, 40_000, (1, 3, 5, 8, 20, 33, 65), config.max_terms)
    print(f"seed {seed}: {phase} {shape}")
    job = job_of(config, shape, "mixed", seed, phases=(phase,))
    counters = simulate(job).counters()
    streamed, results = ("dy", shape.channels) if phase == "bp" else ("x", shape.outputs)
    codes = job.operands[streamed].codes
    padded = padded_channels(codes.shape[1], config.beat)
    codes = np.pad(codes, ((0, 0), (0, padded - codes.shape[1]), (0, 0), (0, 0)), constant_values=CODE_ZERO)
    assert counters["mac16"] == visited(shape, phase, codes, CODE_FP16) * results
    assert counters["mac8"] == visited(shape, phase, codes, CODE_FP8) * results
    # Every core that works on some of the results' channels skips for itself.
    channels = padded_channels(results, config.beat)
    groups = sum(-(-min(64, channels - block) // config.lanes) for block in range(0, channels, 64))
    assert counters["skipped_zero"] == visited(shape, phase, codes, CODE_ZERO) * groups
    pairs = [[(len(tap), sum(p is not None for p in tap)) for tap in taps_of(shape, phase, axis)] for axis in (0, 1)]
    padding = sum(a * b - c * d for a, c in pairs[0] for b, d in pairs[1]) * shape.batch * padded
    assert counters["skipped_padding"] == padding * groups
    assert counters["commands"] == len(job.program.commands)
    kinds = {
        Opcode.MULTIPLY: "visits",
        Opcode.DRAIN: "drain_busy",
        Opcode.LOAD: "load_busy",
        Opcode.STORE: "store_busy",
    }
    assert all(counters[kinds[kind]] > 0 for kind in kinds)
    assert counters["vector_busy"] <= counters["cycles"] and counters["core_busy"] <= config.cores * counters["cycles"]


@pytest.mark.parametrize("name", CONFIGS)
def test_counters_of_the_bus(name: str) -> None:
    """Words on the bus are those that the memory saw, and with plain bits those that the compiler predicts, by kind."""
    config = CONFIGS[name]
    job = random_job(config, 500 + list(CONFIGS).index(name), most_macs=20_000)
    sim = simulate(job, stall=0.2, seed=4)
    counters = sim.counters()
    assert (counters["read_beats"], counters["write_beats"]) == sim.bus_beats
    kinds = ("program", "activation", "error", "weight", "gradient", "optimizer", "norm", "other")
    for direction in ("read", "write"):
        total = sum(counters[f"{direction}_bits_{kind}"] for kind in kinds)
        assert total == counters[f"{direction}_beats"] * config.axi_bits
    lengths = {t.table: sim.memory[t.table : t.table + t.blocks] for t in job.tensors.values()}
    predicted = predict_traffic(job.program, lengths).counters()
    assert {key: counters[key] for key in predicted} == predicted
    # Plain bits by hand: results once, in whole blocks of 64; operands as often as they are loaded.
    results = {name: job.tensors[name] for name in ("y", "dx", "dw")}
    blocks = {name: t.lines * t.planes * -(-t.width // t.block_pixels) for name, t in results.items()}
    written = ("activation", blocks["y"]), ("error", blocks["dx"]), ("gradient", blocks["dw"])
    assert all(counters[f"plain_write_bits_{kind}"] == 16 * 64 * count for kind, count in written)
    loads = [c.fields for c in job.program.commands if c.opcode is Opcode.LOAD]
    elements = sum(
        f["n_count"] * (f["i_end"] - f.get("i_first", 0)) * (f["j_end"] - f.get("j_first", 0)) * f["channel_beats"]
        for f in loads
    )
    plain = sum(counters[f"plain_read_bits_{kind}"] for kind in kinds)
    assert plain == 16 * config.beat * elements
    # Elements that were encoded, padding of blocks included.
    stored = sum(counters[f"stored_{what}"] for what in ("zero", "underflow", "fp8", "fp16"))
    assert stored == 64 * sum(blocks.values())


def busy(config: ChipConfig, policy: str, sparsity: float) -> dict[str, int]:
    """Counters of a feed-forward convolution that fills the array."""
    shape = Convolution(1, 64, 8, 8, config.cores * config.lanes, 3, 3, 1, 1)
    return simulate(job_of(config, shape, policy, phases=("ff",), sparsity=sparsity)).counters()


def test_throughput() -> None:
    """A product a lane and cycle in FP16, two in FP8; zeros cost nothing but a cycle a visit that has nothing else."""
    dense16, dense8, half16, zero16 = (
        busy(TINY, policy, sparsity) for policy, sparsity in (("fp16", 0.0), ("fp8", 0.0), ("fp16", 0.5), ("fp16", 1.0))
    )
    for counters in (dense16, dense8, half16, zero16):
        print({key: counters[key] for key in ("cycles", "core_busy", "mac16", "mac8", "visits")})
    assert dense8["mac8"] > 0.999 * dense16["mac16"] > 0  # a few are zero in FP8
    assert dense8["mac16"] == dense16["mac8"] == zero16["mac16"] == 0
    padding = dense16["skipped_padding"] / 64  # visits with padding alone take a cycle
    for counters in (dense16, dense8, half16):
        best = (counters["mac16"] + counters["mac8"] / 2) / TINY.lanes + padding  # core-cycles
        assert best <= counters["core_busy"] < 1.03 * best
    assert 2 * dense8["core_busy"] < 1.03 * dense16["core_busy"]
    assert zero16["visits"] <= zero16["core_busy"] < 1.2 * zero16["visits"]
    assert zero16["cycles"] < half16["cycles"] < dense16["cycles"] and dense8["cycles"] < dense16["cycles"]


# Training


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_training(stall: float) -> None:
    """Steps of a small ResNet-18: every tensor of every step is the golden model's, and the loss falls."""
    graph = resnet18(width=4, channels=1, image=8, classes=10)
    twins = Twins(
        graph,
        lambda size: Simulator(TINY, size, stall=stall, seed=11),
        TINY,
        batch=2,
        formats=FORMATS["fgmp"],
        optimiser=Optimiser(rate=0.05, momentum=0.9, decay=1e-4, loss_scale=1.0),
        layers=golden.network.resnet18(width=4),
    )
    images, labels = batch_of(graph, 2, 2)
    losses = [twins.train(images, labels) for _ in range(3)]
    print(losses)
    assert losses == sorted(losses, reverse=True)
    measured = twins.trainer.measurements
    assert {m.phase for m in measured} == {"ff", "bp", "wg", "vector", "update"}
    assert sum(m.macs_dense for m in measured if m.phase == "ff") == sum(
        m.macs_dense for m in measured if m.phase == "wg"
    )
    if stall == 0:
        twins.infer(images)


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_dynamic(stall: float) -> None:
    """Steps with dynamic formats: tensors and the controller's states are the golden model's, and states change."""
    graph = dynamic_network()
    twins = Twins(
        graph,
        lambda size: Simulator(TINY, size, stall=stall, seed=12),
        TINY,
        batch=4,
        formats=FORMATS["dynamic"],
        targets=TARGETS["dynamic"],
    )
    seen = []
    for step in range(3):
        twins.train(*batch_of(graph, 4, step))
        seen.append(dict(twins.state.formats))
    assert seen[0] != seen[1]


# Errors

SLOTS, TABLE = 0x10000, 0x20000
WALK = {
    "slots": SLOTS,
    "table": TABLE,
    "n_count": 1,
    "i_count": 1,
    "j_count": 4,
    "line_blocks": 1,
    "log2_block_pixels": 2,
}
LOAD = WALK | {"target": Target.VMEM.value, "i_end": 1, "j_end": 4, "pixel_j": 1, "channel_beats": 4, "dest_j": 4}
STORE = WALK | {"source_j": 4}
RAW = {"address": 0x30000, "line_count": 1, "line_rows": 4, "pitch": 64}
MULTIPLY = {"cores": 1, "initialise": 1, "lanes": 8} | {f"count_{loop}": 1 for loop in "nhwrs"} | {"kmask": 1}
DRAIN = {"count_n": 1, "count_h": 1, "count_w": 1, "lane_beats": 2}
VECTOR = {"op": VectorOp.ADD.value, "outer": 1, "inner": 1}
END = Command(Opcode.END)
ALL_UNITS = (1 << len(Unit)) - 1


class Bench:
    """A simulator with one good encoded block in memory, and a convolution to see that the chip still works."""

    def __init__(self, **options) -> None:
        self.job = job_of(TINY, Convolution(1, 3, 4, 4, 5, 3, 3, 1, 1), "mixed", phases=("ff",))
        self.sim = Simulator(TINY, len(self.job.memory), **options)
        self.job.memory[SLOTS : SLOTS + 0x40000] = 0
        # The job's own tensors stay below the addresses used here.
        assert self.job.map.next <= SLOTS
        slots, lengths = golden.encode_slots(np.full((1, 64), 0x3C00, np.uint16), np.full((1, 64), CODE_FP16, np.uint8))
        self.job.memory[SLOTS : SLOTS + slots.size] = slots.ravel()
        self.job.memory[TABLE] = lengths[0]
        self.sim.memory[:] = self.job.memory

    def check_alive(self) -> None:
        """A good program runs, with the right results."""
        self.sim.inject_errors(0, 0)
        self.sim.memory[:] = self.job.memory
        self.sim.run_program(self.job.address, len(self.job.program.commands))
        self.job.check(self.sim.memory)

    def fails(self, error: Error, commands: list[Command | bytes], first: int, last: int | None = None) -> ChipError:
        """The program ends with this error, and the command last started has index `first` (or up to `last`)."""
        with pytest.raises(ChipError, match=rf"{error.name} \(code {error.value}\) at command") as caught:
            self.sim.run_program(0x40000, commands)
        assert caught.value.code is error and error in caught.value.detail
        assert first <= caught.value.command <= (first if last is None else last)
        assert not self.sim.interrupt
        return caught.value


def bad_fields() -> dict[str, Command]:
    """A command that each unit cannot run, for several of the unit's rules."""
    return {
        "LOAD: no pixels": Command(Opcode.LOAD, **LOAD | {"j_count": 0}),
        "LOAD: no beats": Command(Opcode.LOAD, **LOAD | {"channel_beats": 0}),
        "LOAD: no core": Command(Opcode.LOAD, **LOAD | {"target": Target.SPARSE.value}),
        "LOAD: no such core": Command(Opcode.LOAD, **LOAD | {"target": Target.DENSE.value, "cores": 4}),
        "LOAD: misaligned": Command(Opcode.LOAD, **LOAD | {"slots": SLOTS + 8}),
        "LOAD: scale": Command(Opcode.LOAD, **LOAD | {"scale": 65}),
        "LOAD: range of pixels": Command(Opcode.LOAD, **LOAD | {"j_end": 5}),
        "LOAD_RAW: misaligned": Command(Opcode.LOAD_RAW, **RAW | {"address": 0x30004}),
        "LOAD_RAW: no lines": Command(Opcode.LOAD_RAW, **RAW | {"line_count": 0}),
        "STORE: lo > hi": Command(Opcode.STORE, **STORE | {"lo": 2, "hi": 1}),
        "STORE: below": Command(Opcode.STORE, **STORE | {"below": 3}),
        "STORE: no pixels": Command(Opcode.STORE, **STORE | {"i_count": 0}),
        "STORE: part of a block": Command(Opcode.STORE, **STORE | {"pixel": 1}),
        "STORE_RAW: no rows": Command(Opcode.STORE_RAW, **RAW | {"line_rows": 0}),
        "STORE_RAW: pitch": Command(Opcode.STORE_RAW, **RAW | {"pitch": 4}),
        "MULTIPLY: no core": Command(Opcode.MULTIPLY, **MULTIPLY | {"cores": 0}),
        "MULTIPLY: no such core": Command(Opcode.MULTIPLY, **MULTIPLY | {"cores": 4}),
        "MULTIPLY: no visits": Command(Opcode.MULTIPLY, **MULTIPLY | {"count_s": 0}),
        "DRAIN: no such core": Command(Opcode.DRAIN, **DRAIN | {"core": 2}),
        "DRAIN: no such lanes": Command(Opcode.DRAIN, **DRAIN | {"lane_beats": 3}),
        "DRAIN: scale of FP32": Command(Opcode.DRAIN, **DRAIN | {"scale": 1}),
        "VECTOR: operation": Command(Opcode.VECTOR, **VECTOR | {"op": 31}),
        "VECTOR: nothing to do": Command(Opcode.VECTOR, **VECTOR | {"inner": 0}),
        "VECTOR: sums": Command(Opcode.VECTOR, **VECTOR | {"op": VectorOp.SUM_OUT.value, "sum": 128}),
        "ADAPT: no tensor": Command(Opcode.ADAPT, tensor=0),
        "STATE: lo > hi": Command(Opcode.STATE, tensor=1, lo=2, hi=1),
        "COMMIT: no tensor": Command(Opcode.COMMIT, tensor=0),
        "MARK: misaligned": Command(Opcode.MARK, address=0x30010),
    }


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_field_errors(stall: float) -> None:
    bench = Bench(stall=stall)
    for name, command in bad_fields().items():
        print(name)
        before = bench.sim.memory.copy()
        bench.fails(
            Error.FIELD, [Command(Opcode.NOP), command, Command(Opcode.NOP, wait_units=ALL_UNITS, wait_cores=3), END], 1
        )
        before[0x40000:0x40100] = bench.sim.memory[0x40000:0x40100]
        assert (bench.sim.memory == before).all(), "a command that was refused wrote to memory"
    bench.check_alive()


def test_opcode_errors() -> None:
    bench = Bench()
    unknown = max(opcode.value for opcode in Opcode) + 1
    for opcode in (unknown, 0xFF):
        bench.fails(Error.OPCODE, [Command(Opcode.NOP), bytes([opcode]) + bytes(63), END], 1)
    for opcode in Opcode:
        raw = bytearray(Command(opcode).encode())
        raw[63] |= 0x80
        bench.fails(Error.OPCODE, [bytes(raw), END], 0)
    bench.check_alive()


def test_range_errors() -> None:
    """An address beyond each buffer; also pixels before the tensor."""
    bench = Bench()
    vmem, sparse = TINY.vmem_rows, {"target": Target.SPARSE.value, "cores": 3}
    for name, command in {
        "LOAD: vector memory": Command(Opcode.LOAD, **LOAD | {"dest": vmem - 4}),
        "LOAD: sparse rows": Command(Opcode.LOAD, **LOAD | sparse | {"dest": TINY.rows, "dest_j": 1}),
        "LOAD: sparse columns": Command(Opcode.LOAD, **LOAD | sparse | {"element": TINY.depth - 4}),
        "LOAD: dense rows": Command(
            Opcode.LOAD, **LOAD | sparse | {"target": Target.DENSE.value, "dest": TINY.dense_rows, "channel_beats": 2}
        ),
        "LOAD: pixel": Command(Opcode.LOAD, **LOAD | {"pixel": -1}),
        "LOAD_RAW": Command(Opcode.LOAD_RAW, **RAW | {"vmem": vmem - 3}),
        "STORE": Command(Opcode.STORE, **STORE | {"source": vmem - 4}),
        "STORE: line": Command(Opcode.STORE, **STORE | {"line": -1}),
        "STORE_RAW": Command(Opcode.STORE_RAW, **RAW | {"vmem": vmem}),
        "MULTIPLY: row": Command(Opcode.MULTIPLY, **MULTIPLY | {"row": TINY.rows}),
        "MULTIPLY: negative row": Command(Opcode.MULTIPLY, **MULTIPLY | {"row": -1}),
        "MULTIPLY: partial sums": Command(Opcode.MULTIPLY, **MULTIPLY | {"psum": TINY.psum_rows}),
        "DRAIN: partial sums": Command(Opcode.DRAIN, **DRAIN | {"psum": TINY.psum_rows}),
        "DRAIN: vector memory": Command(Opcode.DRAIN, **DRAIN | {"vmem": vmem - 1}),
        "VECTOR: source": Command(Opcode.VECTOR, **VECTOR | {"a": vmem}),
        "VECTOR: destination": Command(Opcode.VECTOR, **VECTOR | {"dst": vmem}),
    }.items():
        print(name)
        # The vector memory may report it just after the unit has become idle.
        bench.fails(Error.RANGE, [command, Command(Opcode.NOP, wait_units=ALL_UNITS, wait_cores=3), END], 0, 1)
    bench.check_alive()


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_decode_errors(stall: float) -> None:
    """A corrupted header, payload or length, also in a program of the compiler."""
    bench = Bench(stall=stall)
    for what, address, content in (
        ("magic", SLOTS, bytes([0xB4])),
        ("reserved mode", SLOTS, bytes([0xA7])),
        ("mask", SLOTS, bytes([0xA5])),
        ("a zero as payload", SLOTS + 1, bytes(2)),
        ("length", TABLE, bytes([16])),
        ("a block that was never written", TABLE, bytes(1)),
        ("length beyond a slot", TABLE, bytes([20])),
    ):
        print(what)
        bench.sim.memory[:] = bench.job.memory
        bench.sim.memory[address : address + len(content)] = np.frombuffer(content, np.uint8)
        bench.fails(Error.DECODE, [Command(Opcode.LOAD, **LOAD), Command(Opcode.NOP, wait_units=1), END], 0)
    bench.sim.memory[:] = bench.job.memory
    bench.sim.memory[bench.job.tensors["w"].slots] ^= 0x80
    with pytest.raises(ChipError, match="DECODE"):
        bench.sim.run_program(bench.job.address, len(bench.job.program.commands))
    bench.check_alive()


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_bus_errors(stall: float) -> None:
    """SLVERR on any kind of read or write, and addresses where there is no memory."""
    bench = Bench(stall=stall)
    job, sim = bench.job, bench.sim
    for what, address, error in (
        ("block", job.tensors["x"].slots, Error.READ),
        ("length table", job.tensors["w"].table, Error.READ),
        ("program", job.address + 64, Error.READ),
        ("slot", job.tensors["y"].slots, Error.WRITE),
        ("table that is written", job.tensors["y"].table, Error.WRITE),
    ):
        print(what)
        sim.memory[:] = job.memory
        sim.inject_errors(address, address + 1)
        with pytest.raises(ChipError, match=error.name):
            sim.run_program(job.address, len(job.program.commands))
        bench.check_alive()
    beyond = len(job.memory)
    raw = Command(Opcode.LOAD_RAW, **RAW | {"address": beyond}), Command(Opcode.NOP, wait_units=1)
    bench.fails(Error.READ, [*raw, END], 0, 1)
    bench.fails(Error.WRITE, [Command(Opcode.STORE_RAW, **RAW | {"address": beyond}), END], 1)
    bench.fails(Error.WRITE, [Command(Opcode.MARK, address=beyond), END], 0)
    bench.check_alive()


def test_programs_that_do_not_end() -> None:
    bench = Bench()
    bench.fails(Error.LENGTH, [Command(Opcode.NOP)], 0)
    bench.fails(Error.LENGTH, [Command(Opcode.NOP), Command(Opcode.MARK, address=0x30000)], 1)
    bench.sim.write_register(Register.PROGRAM_LENGTH, 0)
    with pytest.raises(ChipError, match="LENGTH"):
        bench.sim.run_program(bench.job.address, 0)
    bench.sim.write_register(Register.PROGRAM, 0x40020)
    bench.sim.write_register(Register.CONTROL, 1)
    bench.sim.run(1000)
    assert bench.sim.read_register(Register.ERROR) == Error.FIELD.value
    bench.sim.write_register(Register.STATUS, 6)
    bench.check_alive()


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_abort(stall: float) -> None:
    """Abort at several times; the chip stops when its units are done, and runs the next program."""
    bench = Bench(stall=stall)
    commands = len(bench.job.program.commands)
    bench.sim.abort()  # nothing runs: nothing happens
    assert bench.sim.read_register(Register.STATUS) == 0
    for after in (1, 30, 100, 200):
        bench.sim.memory[:] = bench.job.memory
        bench.sim.start_program(bench.job.address, commands)
        bench.sim.run(after)
        bench.sim.abort()
        with pytest.raises(ChipError, match="ABORTED") as caught:
            bench.sim.finish_program(max_cycles=10_000)
        assert caught.value.code is Error.ABORTED and caught.value.command < commands - 1
        bench.check_alive()


def test_first_error_counts() -> None:
    """ERROR is the first error's code, ERROR_DETAIL has all kinds."""
    bench = Bench()
    bench.sim.memory[TABLE] = 0
    program = [
        Command(Opcode.LOAD, **LOAD | {"dest": TINY.vmem_rows}),
        Command(Opcode.NOP, wait_units=1),
        END,
    ]
    error = bench.fails(Error.DECODE, program, 0)
    assert error.detail == (Error.RANGE, Error.DECODE)


def test_registers() -> None:
    """Identity and shape of each configuration; accesses that are refused change nothing."""
    for config in CONFIGS.values():
        sim = Simulator(config, 4096)
        assert sim.read_register(Register.ID) == 0x4C4E5055 and sim.read_register(Register.VERSION) == 0x00010000
        shape = [sim.read_register(Register.SHAPE0 + 4 * i) for i in range(4)]
        assert shape == [
            config.cores | config.lanes << 8 | config.beat << 16 | config.axi_bits // 8 << 24,
            config.rows | config.depth << 16,
            config.dense_rows | config.psum_rows << 16,
            config.vmem_rows | config.acc_bits << 24,
        ]
        assert not any(sim.counters().values())
        for offset in (0x018, 0x03C, 0x05C, 0x3FC, 0xFFC):
            with pytest.raises(BusError, match="SLVERR"):
                sim.read_register(offset)
            with pytest.raises(BusError, match="SLVERR"):
                sim.write_register(offset, 1)
        for offset in (Register.ID, Register.SHAPE0, Register.ERROR, Register.COUNTER):
            with pytest.raises(BusError, match="SLVERR"):
                sim.write_register(offset, 0xFFFFFFFF)
        assert sim.read_register(Register.ID) == 0x4C4E5055


def test_accesses_while_busy() -> None:
    """A running program cannot be changed, started again, nor its counters cleared; it ends as if nothing had been."""
    bench = Bench()
    bench.sim.start_program(bench.job.address, len(bench.job.program.commands))
    bench.sim.run(100)
    assert bench.sim.read_register(Register.STATUS) == 1
    for offset, value in (
        (Register.CONTROL, 1),
        (Register.CONTROL, 4),
        (Register.PROGRAM, 0),
        (Register.PROGRAM + 4, 0),
        (Register.PROGRAM_LENGTH, 1),
    ):
        with pytest.raises(BusError, match="SLVERR"):
            bench.sim.write_register(offset, value)
    with pytest.raises(SimulationTimeout, match="not finished after"):
        bench.sim.finish_program(max_cycles=1)
    bench.sim.finish_program()
    bench.job.check(bench.sim.memory)


def test_interrupt() -> None:
    """The interrupt is done or error, if enabled, until cleared."""
    bench = Bench()
    sim = bench.sim
    sim.load_program(0x40000, [END])
    sim.write_register(Register.PROGRAM, 0x40000)
    sim.write_register(Register.PROGRAM_LENGTH, 1)
    sim.write_register(Register.CONTROL, 1)
    sim.run(1000)
    assert sim.read_register(Register.STATUS) == 2 and not sim.interrupt
    sim.write_register(Register.INTERRUPT, 1)
    assert sim.interrupt and sim.run(100) <= 1
    sim.write_register(Register.INTERRUPT, 0)
    assert not sim.interrupt
    sim.write_register(Register.INTERRUPT, 1)
    sim.write_register(Register.STATUS, 4)
    assert sim.interrupt
    sim.write_register(Register.STATUS, 2)
    assert not sim.interrupt and sim.read_register(Register.STATUS) == 0


def test_reset_while_running() -> None:
    """Reset in the middle of a program; the chip starts afresh."""
    bench = Bench()
    for cycles in (50, 500):
        bench.sim.start_program(bench.job.address, len(bench.job.program.commands))
        bench.sim.run(cycles)
        bench.sim.reset()
        assert bench.sim.read_register(Register.STATUS) == 0 and not bench.sim.interrupt
        assert not any(bench.sim.counters().values())
        bench.check_alive()
