"""The model of cycles against the simulated chip, in cycles and in words on the bus."""

import numpy as np
import pytest

import lnpu.sim.chip
from lnpu.bench.cases import cases_of
from lnpu.bench.operation import operation
from lnpu.compiler.cycles import Mix, predict_cycles
from lnpu.compiler.graph import resnet18
from lnpu.compiler.layers import Optimiser
from lnpu.compiler.policies import TARGETS, get_formats
from lnpu.compiler.program import Program
from lnpu.compiler.tensor import MemoryMap, Tensor
from lnpu.compiler.traffic import predict_traffic
from lnpu.compiler.training import TrainingStep
from lnpu.config import TINY
from lnpu.ctrl.commands import COMMAND_BYTES, Command
from lnpu.sim.chip import Chip

TOLERANCE = 0.12
"""Of the cycles of a convolution."""

CASES = {
    case.name: case
    for case in cases_of("small", TINY)
    # What the model knows: compiled programs, zeros independent of each other, no pixel that is masked as a whole.
    if case.program == "compiled" and case.zeros == "random" and case.mask != "lines"
}
EMPTY = ("tiny/3x3-16-16-1px/wg/fp16/b4", "layer/1x1s2-16-32-8px/bp/fp16/b2")
"""Their results are mostly zeros."""


class _Recording:
    """A device that keeps the commands which it runs."""

    def __init__(self, device):
        self.device, self.memory, self.commands = device, device.memory, []

    def run_program(self, address, length):
        image = self.memory[address : address + COMMAND_BYTES * length].tobytes()
        starts = range(0, len(image), COMMAND_BYTES)
        self.commands = [Command.decode(image[at : at + COMMAND_BYTES]) for at in starts]
        return self.device.run_program(address, length)

    def clear_counters(self):
        self.device.clear_counters()

    def counters(self):
        return self.device.counters()


@pytest.fixture(scope="module", params=(8, 32))
def chip(request):
    """`tiny` with a memory of this latency."""
    chip = Chip("tiny", memory_bytes=16 << 20, latency=request.param)
    chip.latency = request.param
    chip.device = _Recording(chip.device)
    yield chip
    chip.device.device.close()


def _mix(case, name, tensor):
    streamed, resident = ({"fp8": 1.0, "fp16": 0.0}[format_] for format_ in (case.streamed, case.resident))
    if name == {"ff": "x", "bp": "dy", "wg": "x"}[case.phase]:
        return Mix.of(tensor, 1 - case.sparsity, streamed)
    if name in ("out", "dw"):
        return Mix.of(tensor, 0.2 if case.name in EMPTY else 1.0, 0.0)
    return Mix.of(tensor, 1.0, resident)


@pytest.mark.parametrize("name", CASES)
def test_convolution(chip, monkeypatch, name):
    tensors = {}

    class Recorded(MemoryMap):
        def tensor(self, name, *arguments, **options):
            tensors[name] = super().tensor(name, *arguments, **options)
            return tensors[name]

    monkeypatch.setattr(lnpu.sim.chip, "MemoryMap", Recorded)
    case = CASES[name]
    function, operands, options = operation(case)
    chip.device.device.reset()
    getattr(chip, function)(*operands, **options)
    program = Program(chip.config)
    program.commands = chip.device.commands
    mixes = {tensor.table: _mix(case, name, tensor) for name, tensor in tensors.items()}
    (segment,) = predict_cycles(program, mixes, latency=chip.latency)
    counters = chip.counters
    assert segment.cycles == pytest.approx(counters["cycles"], rel=TOLERANCE)
    assert segment.cycles == pytest.approx(sum(segment.waits.values()))
    # Weights are taken to have no padded input channels.
    assert segment.read_words == pytest.approx(counters["read_beats"], rel=0.1, abs=200)
    assert segment.products == pytest.approx(counters["mac16"] + counters["mac8"], rel=0.05, abs=100)


def test_training_step():
    """Cycles of every mark are accounted for, and words are what `predict_traffic` counts."""
    step = TrainingStep(
        TINY,
        resnet18(width=8, channels=3, image=8, classes=10),
        batch=2,
        formats=get_formats("dynamic"),
        optimiser=Optimiser(0.01, 0.9, 5e-4, 1024.0),
        targets=TARGETS["dynamic"],
    )
    tensors = [tensor for tensor in step.tensors.values() if isinstance(tensor, Tensor)]
    mixes = {tensor.table: Mix.of(tensor, 0.5) for tensor in tensors}
    lengths = {
        tensor.table: np.full(tensor.blocks, round(mixes[tensor.table].block_bytes), np.uint8) for tensor in tensors
    }
    for program in (step.forward, step.backward, step.update):
        segments = predict_cycles(program, mixes)
        assert [(part.layer, part.phase) for part in segments[:-1]] == [
            (mark.layer, mark.phase) for mark in program.marks
        ]
        assert sum(part.commands for part in segments) == len(program.commands)
        for part in segments:
            assert part.cycles == pytest.approx(sum(part.waits.values()))
        traffic = predict_traffic(program, lengths, lengths)
        bits = TINY.axi_bits
        assert bits * sum(part.read_words for part in segments) == pytest.approx(sum(traffic.read.values()), rel=0.06)
        assert bits * sum(part.write_words for part in segments) == pytest.approx(sum(traffic.write.values()), rel=0.06)


def test_more_work_takes_longer():
    """A dense operand takes more cycles than a sparse one, FP16 more than FP8; a slower memory more."""
    step = TrainingStep(
        TINY,
        resnet18(width=8, channels=3, image=8, classes=10),
        batch=1,
        formats=get_formats("fp8"),
        optimiser=Optimiser(0.01, 0.9, 5e-4, 1024.0),
    )

    def cycles(mix, latency=8):
        return sum(part.cycles for part in predict_cycles(step.forward, default=mix, latency=latency))

    assert cycles(Mix(0.3)) < cycles(Mix(1.0)) < cycles(Mix(1.0, 0.0))
    assert cycles(Mix(0.3)) < cycles(Mix(0.3), latency=64)


def test_mix_length():
    """Lengths of blocks are what the format says."""
    assert Mix().block_bytes == 65
    assert Mix(1.0, 0.0).block_bytes == 129
    assert Mix(0.0).block_bytes == 1
    assert Mix(0.5).block_bytes == 1 + 8 + 32
    assert Mix(0.5, 0.5).block_bytes == 1 + 8 + 4 + 48
    assert Mix(1.0, 1.0, 0.25).block_bytes == 1 + 8 + 16
