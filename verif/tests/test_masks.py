"""Masked products on the whole chip: LOAD of masks, MULTIPLY, DRAIN and ADD_UNMASKED against the command model."""

import numpy as np
import pytest

import golden
from golden.fgmp import Policy, quantize, to_fp16
from lnpu.config import TINY, ChipConfig
from lnpu.ctrl.commands import Command, Opcode, Target, Unit, VectorOp
from lnpu.sim.simulator import Simulator
from verif.command_model import CommandModel
from verif.tests.test_compiler import values

CONFIGS = {
    "tiny": TINY,
    "wide": TINY.replace(
        name="wide", cores=1, lanes=16, beat=8, axi_bits=128, depth=72, vmem_rows=2048, burst_beats=64
    ),
}
PIXELS, DEPTH = 24, 64
SLOTS, TABLES, RESULTS, PROGRAM, MEMORY = 0x10000, 0x40000, 0x50000, 0x60000, 1 << 19
POLICY = Policy.between(2.0**-6, 2.0, below="fp8")


class Job:
    """Two products onto the same masked sums in every core, drained and stored; in memory, and as a program."""

    def __init__(self, config: ChipConfig, rng: np.random.Generator, target: Target, page: int) -> None:
        self.config, self.memory, self.tensors = config, np.zeros(MEMORY, np.uint8), 0
        lanes, beats = config.lanes, config.lanes // config.beat
        everything = {"wait_units": (1 << len(Unit)) - 1, "wait_cores": (1 << config.cores) - 1}
        cores = everything["wait_cores"]
        streamed, self.streamed = self._tensor(values(rng, (PIXELS, DEPTH), sparsity=0.4, special=False))
        dense, _ = self._tensor(values(rng, (DEPTH, lanes), sparsity=0.1, special=True))
        z = values(rng, (PIXELS, lanes), sparsity=0.4, special=True)
        z[rng.random(PIXELS) < 0.3] = rng.choice([-1, 0])
        mask, kept = self._tensor(z)
        addend, _ = self._tensor(values(rng, (PIXELS, lanes), sparsity=0.1, special=True))
        with np.errstate(invalid="ignore"):
            self.live = kept.view(np.float16) > 0
        multiply = {f"count_{loop}": 1 for loop in "nhwrs"} | {
            "cores": cores, "lanes": lanes, "count_w": PIXELS, "row_w": 1, "psum_w": 1, "kmask": (1 << DEPTH) - 1,
            "masked": 1, "mask_page": page,
        }  # fmt: skip
        rows = PIXELS * beats
        self.commands = [
            Command(Opcode.LOAD, **streamed, target=Target.SPARSE.value, cores=cores, dest_j=1),
            Command(Opcode.LOAD, **dense, target=Target.DENSE.value, cores=cores, dest_j=1),
            Command(Opcode.LOAD, **mask, target=target.value, page=page, cores=cores, dest_j=1),
            Command(Opcode.LOAD, **addend, target=Target.VMEM_DENSE.value, dest_j=beats),
            Command(Opcode.MULTIPLY, **multiply, **everything, initialise=1),
            Command(Opcode.MULTIPLY, **multiply | {"kmask": (1 << DEPTH) - 4}),
        ]
        for core in range(config.cores):
            for masked in (1, 0):
                drain = {"count_n": 1, "count_h": 1, "count_w": PIXELS, "psum_w": 1, "lane_beats": beats}
                at = (1 + 2 * core + masked) * rows
                self.commands.append(
                    Command(
                        Opcode.DRAIN, **drain, **everything, core=core, lanes=lanes - 1, fp16=1, masked=masked, vmem=at,
                        vmem_w=beats,
                    )
                )  # fmt: skip
        last = 2 * config.cores * rows
        self.commands += [
            Command(
                Opcode.VECTOR, **everything, op=VectorOp.ADD_UNMASKED.value, outer=1, inner=rows, a=last, a_inner=1,
                b_inner=1, dst=last + rows, dst_inner=1,
            ),
            Command(
                Opcode.STORE_RAW, **everything, address=RESULTS, line_count=1, line_rows=last + rows, vmem=rows,
                pitch=4096,
            ),
            Command(Opcode.END),
        ]  # fmt: skip
        self.results = (last + rows) * config.beat
        assert last + 2 * rows <= config.vmem_rows

    def _tensor(self, x: np.ndarray) -> tuple[dict[str, int], np.ndarray]:
        """Encode a list of pixels; fields of LOAD that read them all, and the patterns that they have."""
        at, self.tensors = self.tensors, self.tensors + 1
        slots, table = SLOTS + at * 0x8000, TABLES + at * 0x400
        bits, codes, _ = quantize(to_fp16(x), POLICY)
        share = 64 // x.shape[1]
        encoded, lengths = golden.encode_slots(bits.reshape(-1, 64), codes.reshape(-1, 64))
        self.memory[slots : slots + encoded.size] = encoded.ravel()
        self.memory[table : table + len(lengths)] = lengths
        return {
            "slots": slots, "table": table, "n_count": 1, "i_count": 1, "i_end": 1, "j_count": len(x), "j_end": len(x),
            "line_blocks": len(lengths), "log2_block_pixels": share.bit_length() - 1, "pixel_j": 1,
            "channel_beats": x.shape[1] // self.config.beat,
        }, bits  # fmt: skip


@pytest.mark.parametrize("page", [0, 1])
@pytest.mark.parametrize("target", [Target.MASK, Target.MASK_DENSE])
@pytest.mark.parametrize("name", CONFIGS)
def test_masked_products(name: str, target: Target, page: int) -> None:
    config = CONFIGS[name]
    rng = np.random.default_rng([page, target.value])
    job = Job(config, rng, target, page)
    sim = Simulator(config, MEMORY, stall=0.2)
    sim.memory[:] = job.memory
    sim.run_program(PROGRAM, job.commands)
    counters = sim.counters()

    model_memory = job.memory.copy()
    model_memory[PROGRAM : PROGRAM + 64 * len(job.commands)] = np.frombuffer(
        b"".join(command.encode() for command in job.commands), np.uint8
    )
    CommandModel(config, model_memory).run(PROGRAM)
    end = RESULTS + 4 * job.results
    got, expected = (memory[RESULTS:end].view(np.uint32) for memory in (sim.memory, model_memory))
    assert np.array_equal(got, expected), f"{(got != expected).sum()} of {got.size} words differ"
    assert (got == 0x80000000).any() and (got == 0x7FC00000).any()

    # Elements of the two commands, by their definition.
    elements = (job.streamed != 0).sum(1) + (job.streamed[:, 2:] != 0).sum(1)
    elements[~job.live.any(1)] = 0
    assert counters["visits"] == 2 * PIXELS * config.cores
    assert counters["masked_visits"] == 2 * int((~job.live.any(1)).sum()) * config.cores > 0
    assert counters["mac16"] + counters["mac8"] == int(elements.sum()) * config.lanes * config.cores
    assert counters["gated"] == int((elements * (~job.live).sum(1)).sum()) * config.cores > 0
