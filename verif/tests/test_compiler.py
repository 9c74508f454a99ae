"""The compiler on the executable specification of the commands (no RTL): every element and code against golden."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

import golden
import golden.network
from golden.controller import RECORD_DTYPE, Targets
from golden.conv import conv2d_input_grad_sums, conv2d_sums, conv2d_weight_grad_sums
from golden.exact import ExactSum, round_sum
from golden.fgmp import Policy, fgmp, quantize
from lnpu.compiler import graph as nodes
from lnpu.compiler import weight_grad
from lnpu.compiler.convolution import (
    Convolution,
    Rounding,
    lower_forward,
    lower_input_grad,
    lower_weight_grad,
    masks_outputs,
)
from lnpu.compiler.direct import DirectLowering
from lnpu.compiler.geometry import Plan
from lnpu.compiler.graph import Graph, fuse, resnet18
from lnpu.compiler.layers import Optimiser, Workspace
from lnpu.compiler.policies import FORMATS, TARGETS
from lnpu.compiler.program import Emission, Program, Region, interleaved, merged
from lnpu.compiler.tensor import MemoryMap, Tensor, padded_channels
from lnpu.compiler.tiles import Tile
from lnpu.compiler.training import Formats, TrainingStep
from lnpu.compiler.weight_grad import WeightGradLowering
from lnpu.config import EDGE, PAPER, TINY, ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Command, Opcode, Target, Unit
from lnpu.driver import Host, Trainer
from lnpu.formats import SLOT_BYTES, TensorKind
from lnpu.loss_scaling import LossScaler, LossScaling
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
    "smallest": TINY.replace(cores=1, lanes=4, depth=16, rows=16, dense_rows=16, psum_rows=16, vmem_rows=640),
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
        return {"flags": self.model.flags}

    def clear_flags(self) -> None:
        """As the chip's register does."""
        self.model.flags = 0


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
    masked : bool
        The cores mask dx where x is not positive, if they can.
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
        masked: bool = False,
        memory_bytes: int = 1 << 22,
    ) -> None:
        self.config, self.shape, self.policies, self.saturate, self.phases = config, shape, policies, saturate, phases
        self.memory = np.zeros(memory_bytes, np.uint8)
        self.map = MemoryMap(size=memory_bytes, config=config, base=4096)
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
        self.masked = masked and masks_outputs(Program(config), shape, self.tensors["dx"])
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
            options = {"mask": t["x"]} if phase == "bp" and self.masked else {}
            areas = {"vmem": space.tiles, "vmem_end": space.end}
            lower(program, self.shape, first, second, out, rounding, store, **areas, **options)
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
            rounded = round_sum(sums, scale - policy.scale, "fp16", self.saturate)
            if phase == "bp" and self.masked:
                rounded[~(self.operands["x"].values() > 0)] = 0
            bits, codes, _ = quantize(rounded, policy)
            padding = host.read(replace(tensor, channels=tensor.padded)).bits[:, tensor.channels :]
            assert not padding.any(), f"{phase}: padding of {name} is not zero"
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


def random_shape(
    rng: np.random.Generator, most_macs: int, channels: tuple[int, ...], most_terms: int = 1 << 16
) -> Convolution:
    """Any convolution whose phases have at most `most_macs` multiply-accumulates, and sums of `most_terms`."""
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
        terms = max(max(c, o) * kernel * width, n * shape.out_height * shape.out_width)
        if shape.macs <= most_macs and terms <= most_terms:
            return shape


def random_job(config: ChipConfig, seed: int, most_macs: int = 200_000, **options) -> ConvolutionJob:
    """A job with random shape, policies, scales and operands; prints what it is."""
    rng = np.random.default_rng(seed)
    channels = (1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 24, 33, 63, 64, 65, 70, 130)
    shape = random_shape(rng, most_macs, channels, config.max_terms)
    names = {name: str(rng.choice(list(POLICIES))) for name in ("x", "w", "dy", "y", "dx", "dw")}
    policies = {name: POLICIES[policy].with_scale(int(rng.integers(-3, 4))) for name, policy in names.items()}
    options = {
        "sparsity": float(rng.choice([0.0, 0.3, 0.8, 1.0], p=[0.2, 0.4, 0.3, 0.1])),
        "special": bool(rng.random() < 0.2),
        "saturate": bool(rng.random() < 0.3),
        "masked": bool(rng.random() < 0.5),
    } | options
    print(f"seed {seed}: {shape}, {names}, {options}")
    return ConvolutionJob(config, shape, policies, rng, **options)


def run_on_model(job: ConvolutionJob) -> None:
    """Run the job on the command model and check it."""
    device = ModelDevice(job.config, len(job.memory))
    device.memory[:] = job.memory
    device.run_program(job.address, len(job.program.commands))
    job.check(device.memory)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CONFIGS)
def test_random_convolutions(name: str, seed: int) -> None:
    run_on_model(random_job(CONFIGS[name], 100 * list(CONFIGS).index(name) + seed))


@pytest.mark.parametrize(
    "shape", [Convolution(1, 330, 1, 1, 140, 1, 1), Convolution(1, 330, 2, 4, 70, 3, 3, 1, 1)], ids=["linear", "3x3"]
)
def test_weight_gradients_stored_together(shape: Convolution, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a round is one step, tiles of channels or of taps that follow each other leave by one STORE."""
    config = PAPER.replace(name="half", cores=6)
    stores = []
    for together in (1, 2, 3):
        monkeypatch.setattr(weight_grad, "_STORED_TOGETHER", together)
        policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), Policy())
        job = ConvolutionJob(config, shape, policies, np.random.default_rng(together), phases=("wg",))
        run_on_model(job)
        stores.append(sum(command.opcode is Opcode.STORE for command in job.program.commands))
    assert stores[0] > stores[1] > stores[2]


def test_jobs_of_one_size_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients of an image that is little more than padding: rounds of jobs sorted by their work, or as they
    come; the results are the same."""
    config = PAPER.replace(name="half", cores=6)
    shape = Convolution(20, 70, 3, 3, 130, 3, 3, 1, 1)
    sizes, batch = [], WeightGradLowering._batch

    def recorded(self: WeightGradLowering, jobs: list, epilogue) -> None:
        sizes[-1].append([self._work(job) for job in jobs])
        batch(self, jobs, epilogue)

    monkeypatch.setattr(WeightGradLowering, "_batch", recorded)
    for worth in (0.0, 1e9):
        monkeypatch.setattr(weight_grad, "_WORTH", worth)
        sizes.append([])
        policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), Policy())
        run_on_model(ConvolutionJob(config, shape, policies, np.random.default_rng(1), phases=("wg",)))
    plain, sorted_ = sizes
    assert sorted(chain(*plain)) == sorted(chain(*sorted_))
    assert sum(map(max, sorted_)) < sum(map(max, plain))


@pytest.mark.parametrize("images", [6, 7])
def test_tiles_take_turns(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teams get tiles at the border of images in turn: over all rounds they have as much to do, all but one tile."""
    found, balanced = [], DirectLowering._balanced

    def recorded(self: DirectLowering, batches: list) -> list:
        result = balanced(self, batches)
        found.append((self, batches, result))
        return result

    monkeypatch.setattr(DirectLowering, "_balanced", recorded)
    config, shape = PAPER.replace(name="quarter", cores=4), Convolution(images, 10, 16, 16, 70, 3, 3, 1, 1)
    policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), Policy())
    run_on_model(ConvolutionJob(config, shape, policies, np.random.default_rng(2), phases=("ff", "bp")))
    for lowering, before, after in found:
        work = [[lowering._work(job) for job in batch] for batch in after]
        assert len({size for batch in work for size in batch}) > 1
        for old, new in zip(before, after, strict=True):
            assert set(map(id, old)) == set(map(id, new))
            assert [job.block for job in new] == sorted(job.block for job in new)
        teams = [sum(batch[m] for batch in work if len(batch) > m) for m in range(lowering.teams.count)]
        fixed = [
            sum(lowering._work(batch[m]) for batch in before if len(batch) > m) for m in range(lowering.teams.count)
        ]
        assert max(teams) - min(teams) <= max(map(max, work))
        assert max(teams) - min(teams) < max(fixed) - min(fixed)


@pytest.mark.parametrize("name", ["tiny", "paper, 3 cores"])
def test_loads_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unit's first load of a step before the MULTIPLYs of the step before, or behind them; the results are the
    same, and MULTIPLYs wait for idle LOAD units less often."""
    idle, queued = [], []
    for ahead in (False, True):
        for lowering in (DirectLowering, WeightGradLowering):
            monkeypatch.setattr(lowering, "_bound_by_loads", lambda self, plan, ahead=ahead: ahead)
        commands = []
        for seed, shape in enumerate((
            Convolution(1, 150, 1, 1, 200, 1, 1),
            Convolution(3, 70, 7, 9, 130, 3, 3, 1, 1),
            Convolution(2, 130, 9, 9, 66, 3, 3, 2, 1),
        )):  # fmt: skip
            policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), Policy())
            job = ConvolutionJob(CONFIGS[name], shape, policies, np.random.default_rng(seed), masked=True)
            run_on_model(job)
            commands += [command.fields for command in job.program.commands if command.opcode is Opcode.MULTIPLY]
        loads = 1 << Unit.LOAD | 1 << Unit.LOAD_DENSE
        idle.append(sum(bool(fields["wait_units"] & loads) for fields in commands))
        queued.append(sum(bool(fields["wait_unit_queues"] & loads) for fields in commands))
    assert idle[1] < idle[0] / 2 and queued[1] > queued[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["tiny", "paper, 3 cores"])
def test_output_phases_together(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided BP whose output phases are added up in one round share the pixels of dy; the results are those of a round
    for each phase."""
    config, cycles = CONFIGS[name], DirectLowering._round_cycles
    pixels = {False: 0, True: 0}
    for seed, shape in enumerate((
        Convolution(2, 70, 9, 7, 130, 3, 3, 2, 1),
        Convolution(1, 16, 8, 8, 70, 2, 3, 2, 0),
        Convolution(2, 8, 5, 10, 20, 7, 5, 3, 2),
        Convolution(2, 8, 5, 10, 20, 1, 2, 2),
    )):  # fmt: skip
        for together in (False, True):
            plans: list[DirectLowering] = []

            def chosen(self: DirectLowering, plan: Plan, together: bool = together, plans: list = plans) -> tuple:
                rounds, *rest = cycles(self, plan)
                plans.append(self)
                return rounds if (plan.phases > 1) is together else 1000 * rounds, *rest

            monkeypatch.setattr(DirectLowering, "_round_cycles", chosen)
            policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), Policy())
            rng = np.random.default_rng(seed)
            job = ConvolutionJob(config, shape, policies, rng, phases=("bp",), masked=masked)
            run_on_model(job)
            assert (plans[0].plan.phases > 1) is together
            pixels[together] += sum(
                command.fields["n_count"] * command.fields["i_count"] * command.fields["j_count"]
                for command in job.program.commands
                if command.opcode is Opcode.LOAD and command.fields["target"] == Target.SPARSE.value
            )
    assert pixels[True] < 0.7 * pixels[False]


def test_pairs_at_borders() -> None:
    """Weight gradients of FP8 images as small as a box: lines at the border have an odd number of pixels, and an odd
    pitch spreads the elements of a visit over the banks of dense rows."""
    policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), POLICIES["fp8"])
    shape = Convolution(2, 64, 4, 8, 64, 3, 3, 1, 1)
    job = ConvolutionJob(
        PAPER.replace(name="quarter", cores=3), shape, policies, np.random.default_rng(4), phases=("wg",)
    )
    run_on_model(job)
    found = [command.fields for command in job.program.commands if command.opcode is Opcode.MULTIPLY]
    assert found and all(fields["shift_r"] % 2 or fields["count_r"] == 1 for fields in found)
    windows = {fields["kmask"] for fields in found}
    lines = [window for window in windows if window.bit_count() > 8]
    assert lines and all(window >> 9 & 0xFF == 0xFF for window in lines)


def test_padding_shared() -> None:
    """Weight gradients of 4x4 images: lines and images in a row of 64 elements share the padding between them, so that
    two images and more are in it, lines at a pitch of 5 elements."""
    config, shape = PAPER.replace(name="quarter", cores=3), Convolution(6, 64, 4, 4, 70, 3, 3, 1, 1)
    policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), POLICIES["fp8"])
    job = ConvolutionJob(config, shape, policies, np.random.default_rng(6), phases=("wg",))
    run_on_model(job)
    windows = {command.fields["kmask"] for command in job.program.commands if command.opcode is Opcode.MULTIPLY}
    image = sum(0xF << 5 * line for line in range(4))
    assert windows and all(window.bit_count() >= 32 and window % (1 << 20) == image for window in windows)


def test_kinds_of_plans_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients of a 1x1 kernel of stride 2: job by job, another kind of plan than the first estimate's takes
    fewer cycles; the results are the same."""
    shape, plans, lower = Convolution(1, 128, 16, 16, 256, 1, 1, 2), [], WeightGradLowering.lower

    def recorded(self: WeightGradLowering, epilogue) -> None:
        plans.append(self)
        lower(self, epilogue)

    monkeypatch.setattr(WeightGradLowering, "lower", recorded)
    for finalists in (1, 4):
        monkeypatch.setattr(weight_grad, "_FINALISTS", finalists)
        policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), Policy())
        run_on_model(ConvolutionJob(PAPER, shape, policies, np.random.default_rng(6), phases=("wg",)))
    first, best = plans
    assert first.plan != best.plan
    assert best._cycles(best.plan) < 0.95 * first._cycles(first.plan)


@pytest.mark.parametrize("phase", ["bp", "wg"])
def test_strided_1x1_on_many_cores(phase: str) -> None:
    """A 1x1 kernel of stride 2 sees one pixel of four, which must not be taken for four kernels' work."""
    config, shape = PAPER.replace(name="half", cores=6), Convolution(2, 64, 8, 8, 128, 1, 1, 2)
    policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), Policy())
    job = ConvolutionJob(config, shape, policies, np.random.default_rng(3), phases=(phase,))
    run_on_model(job)
    used = 0
    for command in job.program.commands:
        if command.opcode is Opcode.MULTIPLY:
            used |= command.fields["cores"]
    assert used.bit_count() >= 4
    zeros = [command for command in job.program.commands if command.opcode is Opcode.VECTOR]
    stores = [command for command in job.program.commands if command.opcode is Opcode.STORE]
    assert len(zeros) == (len(stores) if phase == "bp" else 0)


@pytest.mark.parametrize("sum_rows", [128, 24, 8])
def test_channel_blocks_side_by_side(sum_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many channel blocks in a round as may be, whether that is fast or not: of single layers, with sums, and where
    the accumulators have room for the sums of so many blocks."""
    config = PAPER.replace(name="quarter", cores=4, sum_rows=sum_rows)
    plan, chosen = DirectLowering._plan, []

    def most(self: DirectLowering, most_planes: int) -> Plan:
        limit = min(most_planes, self.out.planes, self.teams.count)
        planes = max(planes for planes in range(1, limit + 1) if self.teams.count % planes == 0)
        chosen.append((most_planes, planes))
        return replace(plan(self, most_planes), planes=planes)

    monkeypatch.setattr(DirectLowering, "_plan", most)
    rng = np.random.default_rng(sum_rows)
    for shape in (Convolution(3, 70, 4, 5, 300, 3, 3, 1, 1), Convolution(2, 200, 5, 5, 130, 3, 3, 2, 1)):
        run_on_model(ConvolutionJob(config, shape, dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), Policy()), rng))
    assert set(chosen) == {(4, 2), (4, 4)}
    chosen.clear()
    graph = network_of(
        2,
        5,
        5,
        Conv("c1", "images", 260, 3, 1, 1),
        BatchNorm("b1", "c1"),
        Relu("r1", "b1"),
        Conv("c2", "r1", 200, 1, 1, 0),
        BatchNorm("b2", "c2"),
        Relu("r2", "b2"),
        classes=3,
    )
    train_on_model(graph, config, batch=3, seed=sum_rows)
    assert {128: (16, 4), 24: (3, 2), 8: (1, 1)}[sum_rows] in chosen


@pytest.mark.parametrize(
    "name, shape",
    [
        ("depth 128", Convolution(1, 4, 1, 128, 4, 1, 1)),  # a tile as wide as the masks
        ("depth 128", Convolution(2, 3, 2, 70, 5, 2, 1, 1, 1)),
        ("tiny", Convolution(70, 65, 1, 1, 130, 1, 1)),  # fully connected, more images than rows
        ("paper, 3 cores", Convolution(33, 70, 1, 1, 10, 1, 1)),
        ("tiny", Convolution(1, 1, 1, 1, 1, 7, 7, 1, 3)),  # an image of one pixel, 48 taps that see padding only
        ("four cores", Convolution(2, 3, 2, 9, 5, 7, 1, 3, 3)),
        ("tiny", Convolution(1, 5, 9, 8, 3, 2, 1, 3)),  # lines, pixels and taps that meet nothing
        ("three cores", Convolution(1, 2, 3, 3, 70, 1, 1, 4)),
        ("edge", Convolution(1, 1, 30, 3, 1, 5, 3, 1, 2)),
    ],
)
def test_corner_cases(name: str, shape: Convolution) -> None:
    policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), POLICIES["mixed"])
    run_on_model(ConvolutionJob(CONFIGS[name], shape, policies, np.random.default_rng(5)))


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
        targets: Mapping[str, Targets] | None = None,
        scaler: LossScaler | None = None,
    ) -> None:
        self.step = TrainingStep(config, graph, batch=batch, formats=formats, optimiser=optimiser, targets=targets)
        kinds = ("activation", "preactivation", "error", "weight", "gradient", "momentum")
        self.network = golden.network.Network(
            layers or golden_layers(graph),
            golden.network.Formats(**{kind: getattr(formats, kind) for kind in kinds}),
            golden.network.Hyperparameters(
                rate=optimiser.rate,
                momentum=optimiser.momentum,
                decay=optimiser.decay,
                loss_scale=optimiser.loss_scale,
            ),
            targets or {},
        )
        parameters = golden.network.initial_parameters(self.network.layers, graph.channels, seed)
        self.state = self.network.initial_state(parameters)
        self.trainer = Trainer(self.step, device(-(-self.step.map.next // 4096) * 4096), scaler=scaler)
        self.trainer.load(parameters)

    def train(self, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
        """One step of both; every tensor must be equal. Returns the loss."""
        scaler = self.trainer.scaler
        expected = self.network.train_step(
            self.state, images, labels, loss_scale=None if scaler is None else scaler.scale
        )
        loss = self.trainer.train(images, labels)
        assert loss == expected.loss
        wrong = {name: count for name, count in compare(self.trainer, expected.tensors).items() if count[0]}
        assert not wrong, f"wrong elements, of: {wrong}"
        self._check_states()
        return loss

    def _check_states(self) -> None:
        """The records of dynamic tensors that were stored show the golden model's next states."""
        memory = self.trainer.device.memory
        for name, state in self.state.formats.items():
            address = self.step.records[name]
            record = memory[address : address + RECORD_DTYPE.itemsize].view(RECORD_DTYPE)[0]
            assert (record["scale"], record["lo"], record["hi"]) == (state.scale, state.lo, state.hi), name

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
    "batch norm of the images": lambda: network_of(
        3, 4, 5, BatchNorm("b0", "images"), Relu("r0", "b0"), Conv("c1", "r0", 4, 3), BatchNorm("b1", "c1")
    ),
    "three channel blocks": lambda: network_of(
        1,
        4,
        3,
        Conv("c1", "images", 150, 3, 1, 1),
        BatchNorm("b1", "c1"),
        Relu("r1", "b1"),
        Conv("c2", "r1", 150, 1),
        BatchNorm("b2", "c2"),
        Add("s", "b2", "r1"),
        Relu("r", "s"),
    ),
    "over 64 channels": lambda: network_of(
        1, 3, 3, Conv("c1", "images", 70, 3, 1, 1), BatchNorm("b1", "c1"), Relu("r1", "b1"), classes=70
    ),
}


def train_on_model(
    graph: Graph, config: ChipConfig, *, batch: int, formats: str = "fp16", steps: int = 1, seed: int = 0
) -> Twins:
    """Steps of training on the command model, with every tensor compared."""
    print(f"seed {seed}, batch {batch}, {config}")
    twins = Twins(graph, lambda size: ModelDevice(config, size), config, batch=batch, formats=FORMATS[formats])
    for step in range(steps):
        twins.train(*batch_of(graph, batch, 10 * seed + step))
    return twins


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    """Networks that are not ResNet: two steps (momentum), then inference."""
    graph, seed = NETWORKS[name](), list(NETWORKS).index(name)
    config = (TINY, CONFIGS["three cores"], CONFIGS["depth 48"])[seed % 3].replace(acc_bits=97, sum_rows=128)
    batch = 1 + seed % 4
    twins = train_on_model(graph, config, batch=batch, formats=("fp16", "fgmp")[seed % 2], steps=2, seed=seed)
    twins.infer(batch_of(graph, batch, seed)[0])


def dynamic_network() -> Graph:
    """Every way in which a dynamic tensor is stored and read: sums, partial errors, shortcuts, pools, strides."""
    graph = Graph("dynamic", 2, 9, 9)
    x = graph.add(nodes.Conv("a", "images", 8, 3, 1, 1))
    x = graph.add(nodes.Relu("ar", graph.add(nodes.BatchNorm("an", x))))
    x = graph.add(nodes.MaxPool("ap", x, 3, 2, 1))
    y = graph.add(nodes.BatchNorm("bn", graph.add(nodes.Conv("b", x, 12, 3, 2, 1))))
    z = graph.add(nodes.BatchNorm("cn", graph.add(nodes.Conv("c", x, 12, 1, 2, 0))))
    x = graph.add(nodes.Relu("r", graph.add(nodes.Add("s", y, z))))
    graph.add(nodes.Linear("fc", graph.add(nodes.GlobalAveragePool("gap", x)), 5))
    return graph


def test_dynamic() -> None:
    """Four steps with dynamic formats: tensors and states equal, and the states do change."""
    graph = dynamic_network()
    twins = Twins(
        graph, lambda size: ModelDevice(TINY, size), TINY, batch=4, formats=FORMATS["dynamic"],
        targets=TARGETS["dynamic"],
    )  # fmt: skip
    before = None
    changes = 0
    for step in range(4):
        twins.train(*batch_of(graph, 4, step))
        changes += before is not None and before != twins.state.formats
        before = dict(twins.state.formats)
    assert changes >= 2
    assert {tensor.name for tensor, _ in twins.step.dynamic} >= set(twins.state.formats)
    twins.infer(batch_of(graph, 4, 9)[0])


def test_momentum_format() -> None:
    """Momenta stored in FP16, and in FGMP with a scale: what is stored is what the next step uses."""
    graph = dynamic_network()
    for momentum in (Policy(scale=-10), Policy.between(2.0**-6, 2.0, below="fp8", scale=-6)):
        formats = replace(FORMATS["dynamic"], momentum=momentum)
        twins = Twins(
            graph, lambda size: ModelDevice(TINY, size), TINY, batch=2, formats=formats, targets=TARGETS["dynamic"]
        )
        for step in range(3):
            twins.train(*batch_of(graph, 2, step))


def test_dynamic_loss_scaling() -> None:
    """The scale falls while errors overflow, updates are then left out, and it rises after clean steps."""
    graph = dynamic_network()
    scaler = LossScaler(LossScaling(start=20, interval=2, most=20))
    twins = Twins(graph, lambda size: ModelDevice(TINY, size), TINY, batch=2, formats=FORMATS["fp16"], scaler=scaler)
    scales, parameters = [], []
    for step in range(12):
        twins.train(*batch_of(graph, 2, step))
        scales.append(scaler.exponent)
        parameters.append(twins.state.parameters["a"].copy())
    assert scaler.skipped > 2
    assert scales[: scaler.skipped] != sorted(scales) or min(scales) < 20
    moves = {b - a for a, b in pairwise(scales)}
    assert moves == {-1, 0, 1}
    unchanged = [np.array_equal(a, b) for a, b in pairwise(parameters)]
    fell = [b < a for a, b in pairwise(scales)]
    assert unchanged == fell


def test_too_many_dynamic_tensors() -> None:
    with pytest.raises(ValueError, match="tensor_states = 8 allows 7"):
        TrainingStep(
            TINY.replace(tensor_states=8), dynamic_network(), batch=1, formats=FORMATS["dynamic"], optimiser=OPTIMISER,
            targets=TARGETS["dynamic"],
        )  # fmt: skip
    with pytest.raises(ValueError, match="targets must be of kinds of Formats, not momentum"):
        TrainingStep(
            TINY, dynamic_network(), batch=1, formats=FORMATS["fgmp"], optimiser=OPTIMISER,
            targets={"momentum": Targets()},
        )  # fmt: skip


@pytest.mark.parametrize("stem, image", [("cifar", 6), ("imagenet", 20)])
def test_resnet18(stem: str, image: int) -> None:
    """A step of a narrow ResNet-18, with the golden model's own description of the network."""
    graph = resnet18(width=2, channels=3, image=image, classes=5, stem=stem)
    layers = golden.network.resnet18(width=2, classes=5, stem=stem)
    assert golden_layers(graph) == layers
    train_on_model(graph, TINY, batch=2, formats="fgmp", seed=7)


def test_operands_beside_large_tiles() -> None:
    """Tiles that fill the vector memory, with two operands each to be fused onto them (a partial error, a mask)."""
    graph = network_of(
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
    )
    train_on_model(graph, TINY.replace(vmem_rows=1500), batch=1)


def test_average_pool_of_a_large_batch() -> None:
    """More images than the rows for sums, in a vector memory smaller than these."""
    graph = network_of(2, 2, 2, Conv("c1", "images", 33, 1), Relu("r", "c1"))
    train_on_model(graph, TINY.replace(vmem_rows=600, sum_rows=1024), batch=24)


def test_compare_notices() -> None:
    """`compare` reports a changed element, a changed code and a changed FP32 word."""
    graph = NETWORKS["no batch norm"]()
    twins = train_on_model(graph, TINY, batch=1)
    expected = twins.network.forward(twins.state, batch_of(graph, 1, 3)[0])[0]
    twins.trainer.forward(batch_of(graph, 1, 3)[0])
    assert not any(bad for bad, _ in compare(twins.trainer, expected).values())
    expected["c1"].bits[0, 0, 0, 0] ^= 1
    expected["r1"].codes[0, 0, 0, 0] ^= 1
    expected["fc"].view(np.uint32)[0, 0] ^= 1
    assert {name for name, (bad, _) in compare(twins.trainer, expected).items() if bad} == {"c1", "r1", "fc"}


@pytest.mark.parametrize(
    "node, message",
    [
        (Conv("c", "images", 4, 3), "names must be unique, not 'c' twice"),
        (Relu("r", "nothing"), "r reads 'nothing', which is not one of images, c"),
        (Add("a", "c", "none"), "a reads 'none', which is not one of"),
        (Add("a", "c", "images"), r"a adds \(4, 6, 6\) and \(1, 8, 8\): shapes must be equal"),
        (Add("a", "c", "c"), "a must add two tensors, not c to itself"),
        (Conv("d", "c", 4, 9, 1, 1), r"d: a kernel of 9 does not fit \(4, 6, 6\)"),
        (MaxPool("p", "c", 7, 1), "p: a kernel of 7 does not fit"),
        (MaxPool("p", "c", 3, 1, 2), "padding of p must be at most half the kernel, 1, not 2"),
        (Conv("d", "c", 0, 1), "outputs of d must be at least 1, not 0"),
        (Conv("d", "c", 1, 0), "kernel of d must be at least 1, not 0"),
        (MaxPool("p", "c", 2, 0), "stride of p must be at least 1, not 0"),
        (Conv("d", "c", 1, 1, 1, -1), "padding of d must be at least 0, not -1"),
        (nodes.Linear("f", "c", 3), "f needs images of one pixel, not 6x6"),
    ],
)
def test_nodes_that_do_not_fit(node: nodes.Node, message: str) -> None:
    graph = Graph("test", 1, 8, 8)
    graph.add(Conv("c", "images", 4, 3))
    with pytest.raises(ValueError, match=message):
        graph.add(node)
    assert list(graph.shapes) == ["images", "c"] and len(graph.nodes) == 1


def compile_graph(graph: Graph, config: ChipConfig = TINY, **options) -> TrainingStep:
    """Compile for training with FP16."""
    return TrainingStep(config, graph, **({"batch": 1, "formats": Formats(), "optimiser": OPTIMISER} | options))


def test_graphs_that_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="height must be at least 1, not 0"):
        Graph("test", 1, 0, 1)
    empty = Graph("test", 1, 1, 1)
    with pytest.raises(ValueError, match="the last node of a network must be linear"):
        compile_graph(empty)
    empty.add(Relu("r", "images"))
    with pytest.raises(ValueError, match="the last node of a network must be linear"):
        compile_graph(empty)
    with pytest.raises(ValueError, match="nothing reads c1"):
        compile_graph(network_of(1, 4, 4, Conv("c1", "images", 4, 1), Conv("c2", "images", 4, 1)))
    shared = network_of(
        1, 4, 4, Conv("c", "images", 4, 1), BatchNorm("b1", "c"), BatchNorm("b2", "c"), Add("a", "b1", "b2")
    )
    with pytest.raises(ValueError, match="the input of a batch norm must have no other use, but c has b1, b2"):
        compile_graph(shared)
    linear = Graph("test", 4, 1, 1)
    linear.add(nodes.Linear("f1", "images", 8))
    linear.add(nodes.Linear("f2", linear.add(Relu("r", "f1")), 3))
    with pytest.raises(ValueError, match="r reads f1, but a linear layer must be the last node"):
        compile_graph(linear)
    with pytest.raises(ValueError, match="stem must be 'cifar' or 'imagenet', not 'none'"):
        resnet18(stem="none")
    with pytest.raises(ValueError, match="batch must be at least 1, not 0"):
        compile_graph(NETWORKS["no batch norm"](), batch=0)


def test_groups() -> None:
    """What joins a chain: batch norm, add and ReLU, in that order, as long as nothing else reads what is between."""

    def groups(*layers: nodes.Node) -> list[tuple]:
        stages = fuse(network_of(4, 4, 4, *layers))
        return [(s.name, s.x, s.norm, s.other, s.relu) for s in stages if isinstance(s, nodes.GroupStage)]

    conv, norm = Conv("c", "images", 4, 1), BatchNorm("b", "c")
    assert groups(conv, norm) == [("b", "c", "b", None, False)]
    assert groups(conv, norm, Relu("r", "b")) == [("r", "c", "b", None, True)]
    assert groups(conv, norm, Add("a", "b", "images"), Relu("r", "a")) == [("r", "c", "b", "images", True)]
    assert groups(conv, norm, Add("a", "images", "b")) == [
        ("b", "c", "b", None, False),
        ("a", "images", None, "b", False),
    ]
    assert groups(conv, norm, Relu("r", "b"), Add("a", "b", "r")) == [
        ("b", "c", "b", None, False),
        ("r", "b", None, None, True),
        ("a", "b", None, "r", False),
    ]
    assert groups(conv, Relu("r", "c"), Relu("s", "r")) == [("r", "c", None, None, True), ("s", "r", None, None, True)]
    # The chain runs where its other operand is there.
    late = groups(conv, norm, Conv("d", "images", 4, 1), BatchNorm("e", "d"), Relu("f", "e"), Add("a", "b", "f"))
    assert late == [("f", "d", "e", None, True), ("a", "c", "b", "f", False)]


# Limits


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"stride": 0}, "stride must be at least 1, not 0"),
        ({"padding": -1}, "padding must be 0 or more, not -1"),
        ({"kernel_height": 6}, "the kernel must fit the padded image, not 6x3 on 5x5"),
    ],
)
def test_shapes_that_are_none(fields: dict[str, int], message: str) -> None:
    good = {"batch": 1, "channels": 1, "height": 5, "width": 5, "outputs": 1, "kernel_height": 3, "kernel_width": 3}
    with pytest.raises(ValueError, match=message):
        Convolution(**(good | fields))


@pytest.mark.parametrize(
    "phase, shape",
    [
        ("ff", Convolution(1, 9, 1, 1, 1, 1, 1)),
        ("ff", Convolution(1, 1, 3, 3, 1, 3, 3)),
        ("bp", Convolution(1, 1, 1, 1, 9, 1, 1)),
        ("wg", Convolution(9, 1, 1, 1, 1, 1, 1)),
        ("wg", Convolution(1, 1, 3, 3, 1, 1, 1)),
    ],
)
def test_sums_that_might_overflow(phase: str, shape: Convolution) -> None:
    """84 bits hold 8 products whatever they are: 9 are refused, 8 of the largest are exact."""
    config = TINY.replace(acc_bits=84)
    policies = dict.fromkeys(("x", "w", "dy", "y", "dx", "dw"), Policy())
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"must sum up at most 8 products, the most that acc_bits = 84 hold .*, not 9"):
        ConvolutionJob(config, shape, policies, rng, phases=(phase,))
    with pytest.raises(ValueError, match="the sums of c have 9 terms; acc_bits = 84 allows 8, use more"):
        compile_graph(network_of(1, 3, 3, Conv("c", "images", 1, 1), BatchNorm("b", "c")), config)


def test_largest_sums() -> None:
    """As many of the largest products as the accumulator holds, then subtracted again."""
    config = TINY.replace(acc_bits=85)
    chip = Chip(config, device=ModelDevice(config, 1 << 20))
    x = np.full((1, 16), 65504, np.float16)
    w = np.array([[65504] * 16, [-65504] * 16, [65504] * 8 + [-65504] * 8], np.float16)
    got = chip.linear(x, w, out="fp32")
    np.testing.assert_array_equal(got, golden.linear(x, w, out="fp32"))
    np.testing.assert_array_equal(got, [[16 * 65504**2, -16 * 65504**2, 0]])


def test_tiles_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="vmem_rows must be at least 384 for training, not 383"):
        Workspace(Program(TINY.replace(vmem_rows=383)))
    with pytest.raises(ValueError, match="sum_rows must be at least 32 for training, not 31"):
        Workspace(Program(TINY.replace(sum_rows=31)))


def test_memory_map() -> None:
    memory = MemoryMap(size=4096, config=TINY, base=100)
    assert memory.allocate("a", 1) == 128 and memory.allocate("b", 60, 4) == 132 and memory.next == 192
    tensor = memory.tensor("t", TensorKind.WEIGHT, height=3, width=5, channels=7, policy=Policy())
    assert (tensor.padded, tensor.line_blocks, tensor.blocks) == (8, 1, 3)
    assert tensor.slots % 32 == 0 and tensor.table == tensor.slots + 512 and memory.next == tensor.table + 32
    raw = memory.raw("r", TensorKind.NORM, rows=3, channels=65)
    assert raw.padded == 128 and raw.pitch == 512 and memory.next == raw.address + 3 * 512
    left = 4096 - memory.next
    with pytest.raises(
        MemoryError, match=rf"last takes {left + 1} bytes at 0x[0-9a-f]+, but the memory has 4096 bytes"
    ):
        memory.allocate("last", left + 1)
    memory.allocate("last", left)
    with pytest.raises(MemoryError, match="images takes 6400 bytes"):
        compile_graph(network_of(1, 20, 20, Conv("c", "images", 1, 1)), memory=4096)
    assert [padded_channels(n, 4) for n in (1, 4, 5, 33, 64, 65, 128, 129)] == [4, 4, 8, 64, 64, 128, 128, 192]
    assert padded_channels(1, 16) == 16


def test_masks_outputs() -> None:
    """Where cores can mask: a line holds a whole channel block, and every pixel gets products."""

    def can(config: ChipConfig, channels: int, kernel: int, stride: int) -> bool:
        shape = Convolution(1, channels, 8, 8, 8, kernel, kernel, stride, kernel // 2)
        out = MemoryMap(size=1 << 20, config=config).tensor(
            "dx", TensorKind.ERROR, images=1, height=8, width=8, channels=channels, policy=Policy()
        )
        return masks_outputs(Program(config), shape, out)

    assert can(TINY, 8, 3, 1) and can(TINY, 5, 3, 2) and can(PAPER, 64, 1, 1) and can(PAPER, 256, 3, 2)
    assert not can(TINY, 9, 3, 1) and not can(EDGE, 64, 3, 1)
    assert not can(PAPER, 64, 1, 2)


def test_operands_that_do_not_fit() -> None:
    """Messages of the NumPy-like functions."""
    chip = Chip(TINY, device=ModelDevice(TINY, 1 << 20))
    x, w = np.zeros((1, 2, 4, 4), np.float16), np.zeros((3, 2, 3, 3), np.float16)
    for call, error, message in (
        (lambda: chip.conv2d(x, w[:, :1]), ValueError, "w must have 2 input channels like x, not 1"),
        (lambda: chip.conv2d(x.astype(int), w), TypeError, "x must be float16 or float32, not int64"),
        (lambda: chip.conv2d(x[0], w), ValueError, "x must have 4 dimensions"),
        (lambda: chip.conv2d(x[:0], w), ValueError, "none of them empty"),
        (lambda: chip.conv2d(x, w, out="fp64"), ValueError, "out must be fp16 or fp32, not 'fp64'"),
        (lambda: chip.conv2d(x, w, x_format="fp4"), ValueError, "fp4"),
        (
            lambda: chip.conv2d_input_grad(x, w, input_shape=(1, 2, 9, 9)),
            ValueError,
            r"dy must have shape \(1, 3, 7, 7\), that of the output, not \(1, 2, 4, 4\)",
        ),
        (
            lambda: chip.conv2d_input_grad(w[:1, :, :2, :2], w[:2], input_shape=(1, 2, 4, 4), mask=x[:, :1]),
            ValueError,
            r"mask must have shape \(1, 2, 4, 4\), that of the gradient, not \(1, 1, 4, 4\)",
        ),
        (
            lambda: chip.conv2d_input_grad(x, w, input_shape=(1, 1, 4, 4)),
            ValueError,
            r"input_shape must be \(N, 2, H, W\)",
        ),
        (lambda: chip.conv2d_weight_grad(x, x, kernel_shape=(3,)), ValueError, r"kernel_shape must be \(R, S\)"),
        (lambda: chip.conv2d(x, np.zeros((1, 2, 5, 5), np.float16)), ValueError, "the kernel must fit"),
    ):
        with pytest.raises(error, match=message):
            call()


# Hazards


def waits(program: Program) -> list[tuple]:
    """Units and cores that each command waits for, and cores whose queues it waits for if there are any.

    A unit that may still do its last command is (unit, "queue").
    """
    return [
        (
            {unit for unit in Unit if c.fields["wait_units"] >> unit & 1}
            | {(unit, "queue") for unit in Unit if c.fields["wait_unit_queues"] >> unit & 1},
            c.fields["wait_cores"],
            *([c.fields["wait_queues"]] if c.fields["wait_queues"] else []),
        )
        for c in program.commands
        if "wait_units" in c.fields
    ]


def emitted(*commands: tuple[Opcode, list[Region], list[Region], dict]) -> list[tuple]:
    """Waits of commands that read and write these regions."""
    program = Program(TINY)
    for opcode, reads, writes, fields in commands:
        program.emit(opcode, reads=reads, writes=writes, **fields)
    return waits(program)


A, B = Region("vmem", 0, 10), Region("vmem", 10, 20)
BOTH = Region("vmem", 9, 11)


def test_regions() -> None:
    assert A.overlaps(BOTH) and BOTH.overlaps(A) and B.overlaps(BOTH)
    assert not A.overlaps(B) and not A.overlaps(Region("memory", 0, 10))


def test_hazards() -> None:
    vector, store, load, drain = Opcode.VECTOR, Opcode.STORE, Opcode.LOAD, Opcode.DRAIN
    # Read after write, write after write, write after read; never read after read.
    assert emitted((load, [], [A], {}), (vector, [A], [B], {}))[1] == ({Unit.LOAD}, 0)
    assert emitted((load, [], [A], {}), (drain, [], [BOTH], {}))[1] == ({Unit.LOAD}, 0)
    assert emitted((store, [A], [], {}), (vector, [B], [BOTH], {}))[1] == ({Unit.STORE}, 0)
    assert emitted((store, [A], [], {}), (vector, [A], [B], {}))[1] == (set(), 0)
    assert emitted((load, [], [A], {}), (vector, [B], [B], {}))[1] == (set(), 0)
    # A unit takes a second command, so that what it did before that is over when it takes a third; not so FGMP.
    queue = {(Unit.VECTOR, "queue")}
    assert emitted((vector, [], [A], {}), (vector, [], [B], {}), (store, [A], [], {}))[2] == (queue, 0)
    assert emitted((vector, [], [A], {}), (vector, [], [B], {}), (store, [B], [], {}))[2] == ({Unit.VECTOR}, 0)
    assert emitted((vector, [], [A], {}), *2 * [(vector, [], [B], {})], (store, [A], [], {}))[3] == (set(), 0)
    adapt = (Opcode.ADAPT, [], [A], {})
    assert emitted(adapt, (Opcode.ADAPT, [], [B], {}), (store, [A], [], {}))[2] == (set(), 0)
    raw = (Opcode.LOAD_RAW, [], [B], {})
    dense = (load, [], [B], {"target": Target.DENSE.value})  # by another unit
    assert emitted((load, [], [A], {}), dense, (vector, [A, B], [], {}))[2] == ({Unit.LOAD, Unit.LOAD_DENSE}, 0)
    assert emitted(dense, (load, [], [B], {}))[1] == ({Unit.LOAD_DENSE}, 0)
    tile = (load, [], [A], {"target": Target.VMEM_DENSE.value})  # by the same unit
    assert emitted(tile, dense, (vector, [A], [], {}))[2] == ({(Unit.LOAD_DENSE, "queue")}, 0)
    assert emitted((load, [], [A], {}), raw, (vector, [A], [], {}))[2] == ({(Unit.LOAD, "queue")}, 0)
    assert emitted((load, [], [A], {}), raw, raw, (vector, [A], [], {}))[3] == (set(), 0)
    assert emitted((load, [], [A], {}), (Opcode.LOAD_RAW, [A], [A], {}))[1] == (set(), 0)
    # STORE_RAW has a unit of its own.
    tensor, other = Region("memory t", 0, 10), Region("memory t", 10, 20)
    store_raw = (Opcode.STORE_RAW, [A], [tensor], {})
    assert emitted(store_raw, (Opcode.LOAD_RAW, [tensor], [B], {}))[1] == ({Unit.STORE_RAW}, 0)
    assert emitted(store_raw, (Opcode.LOAD_RAW, [other], [B], {}))[1] == (set(), 0)
    assert emitted(store_raw, (Opcode.LOAD_RAW, [other], [BOTH], {}))[1] == ({Unit.STORE_RAW}, 0)
    assert emitted(store_raw, (vector, [B], [BOTH], {}))[1] == ({Unit.STORE_RAW}, 0)
    assert emitted(store_raw, (store, [A], [other], {}))[1] == (set(), 0)
    assert emitted((store, [A], [tensor], {}), store_raw)[1] == ({Unit.STORE}, 0)
    raw_queue = {(Unit.STORE_RAW, "queue")}
    assert emitted(store_raw, (Opcode.STORE_RAW, [B], [other], {}), (vector, [], [A], {}))[2] == (raw_queue, 0)
    # What has been waited for is over, for good; others are not.
    assert emitted((load, [], [A], {}), (vector, [A], [], {}), (store, [A], [], {}))[2] == (set(), 0)
    both = emitted((load, [], [A], {}), (drain, [], [B], {}), (vector, [A], [], {}), (store, [A, B], [], {}))
    assert both[2:] == [({Unit.LOAD}, 0), ({Unit.DRAIN}, 0)]


def test_hazards_of_cores() -> None:
    def sparse(core: int, page: int) -> Region:
        return Region(f"sparse {core}", page, page + 1)

    def psum(core: int) -> Region:
        return Region(f"psum {core}")

    load = (Opcode.LOAD, [], [sparse(0, 0), sparse(1, 0)], {})
    multiply = (Opcode.MULTIPLY, [sparse(0, 0)], [psum(0)], {"cores": 1})
    other = (Opcode.MULTIPLY, [sparse(1, 0)], [psum(1)], {"cores": 2})
    drain = (Opcode.DRAIN, [psum(0)], [A], {})
    assert emitted(load, multiply, other, drain)[1:] == [({Unit.LOAD}, 0), (set(), 0), (set(), 1)]
    # The next page loads meanwhile; the page that is read does not.
    assert emitted(load, multiply, (Opcode.LOAD, [], [sparse(0, 1)], {}))[2] == (set(), 0)
    assert emitted(load, multiply, (Opcode.LOAD, [], [sparse(0, 0)], {}))[2] == (set(), 1)
    # The sums that are drained are not started anew.
    assert emitted(multiply, drain, multiply)[1:] == [(set(), 1), ({Unit.DRAIN}, 0)]
    # A core takes a second command: what only the one before it uses is free when that has begun.
    second = (Opcode.MULTIPLY, [sparse(0, 1)], [Region("psum 0", 1, 2)], {"cores": 1})
    free, third = (Opcode.LOAD, [], [sparse(0, 0)], {}), (Opcode.LOAD, [], [sparse(0, 1)], {})
    assert emitted(multiply, second, free)[2] == (set(), 0, 1)
    assert emitted(multiply, second, drain)[2] == (set(), 0, 1)
    assert emitted(multiply, second, third)[2] == (set(), 1)
    assert emitted(multiply, second, free, drain)[3] == (set(), 0)  # once waited for, over
    assert emitted(multiply, second, free, third)[3] == (set(), 1)
    assert emitted(multiply, second, second, free)[3] == (set(), 0)
    assert emitted(multiply, other, second, (Opcode.LOAD, [], [sparse(0, 0), sparse(1, 0)], {}))[3] == (set(), 2, 1)


def test_recorded() -> None:
    """What is recorded is emitted only when it is played; loss scalings are where their commands then are."""
    program = Program(TINY)

    def body() -> None:
        program.emit(Opcode.VECTOR, writes=[A], loss_scaling=1)
        inner = program.record(lambda: program.emit(Opcode.STORE, reads=[A]))
        program.play(inner)

    emissions = program.record(body)
    assert [e.opcode for e in emissions] == [Opcode.VECTOR, Opcode.STORE] and not program.commands
    program.emit(Opcode.LOAD, writes=[B])
    program.play(emissions)
    assert [c.opcode for c in program.commands] == [Opcode.LOAD, Opcode.VECTOR, Opcode.STORE]
    assert program.loss_scalings == [1] and waits(program)[2] == ({Unit.VECTOR}, 0)


def test_interleaved() -> None:
    def some(opcode: Opcode, count: int) -> list[Emission]:
        return [Emission(opcode, [], [], {"pixel": number}) for number in range(count)]

    loads, stores = some(Opcode.LOAD, 2), some(Opcode.STORE, 4)
    mixed = interleaved(loads, stores)
    assert [e.opcode for e in mixed] == [Opcode.LOAD, Opcode.STORE, Opcode.STORE] * 2
    assert [e for e in mixed if e in loads] == loads and [e for e in mixed if e in stores] == stores
    assert interleaved([], loads) == loads and interleaved() == []


def test_merged() -> None:
    """MULTIPLYs that differ in their cores alone become one, at the first's place, with the regions of all."""

    def multiply(core: int, psum: int, **fields: int) -> Emission:
        region = Region(f"psum {core}", psum, psum + 1)
        return Emission(Opcode.MULTIPLY, [], [region], {"cores": 1 << core, "psum": psum} | fields)

    load = Emission(Opcode.LOAD, [], [], {})
    found = merged([multiply(0, 3), load, multiply(1, 3), multiply(2, 4), multiply(2, 3), multiply(2, 3), load])
    assert [e.fields.get("cores") for e in found] == [0b111, None, 0b100, 0b100, None]
    assert [region.space for region in found[0].writes] == ["psum 0", "psum 1", "psum 2"]


def test_marks() -> None:
    """A mark waits for everything."""
    program = Program(TINY)
    program.emit(Opcode.LOAD, writes=[A])
    program.mark("layer", "ff", 4096, 12)
    program.emit(Opcode.VECTOR, reads=[A])
    program.end()
    assert [c.opcode for c in program.commands] == [Opcode.LOAD, Opcode.MARK, Opcode.VECTOR, Opcode.END]
    assert program.commands[2].fields["wait_units"] == 0
    assert [(m.layer, m.phase, m.address, m.macs_dense) for m in program.marks] == [("layer", "ff", 4096, 12)]
    assert len(program.encode()) == program.size == 4 * COMMAND_BYTES
    raw = program.encode()
    assert [Command.decode(raw[i : i + 64]).opcode for i in range(0, 256, 64)] == [c.opcode for c in program.commands]
