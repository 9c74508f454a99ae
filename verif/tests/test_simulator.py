"""The simulation harness, on a stand-in for the chip that copies memory."""

import os
import subprocess
import sys
import time
from fnmatch import fnmatchcase

import numpy as np
import pytest

import golden
from lnpu.chip import Chip as LnpuChip
from lnpu.config import TINY
from lnpu.ctrl.counters import COUNTERS
from lnpu.hdl import emit_verilog
from lnpu.interfaces import Error
from lnpu.sim import Chip
from lnpu.sim import build as build_module
from lnpu.sim.build import BuildError, build
from lnpu.sim.simulator import BusError, ChipError, ProtocolError, Register, SimulationTimeout, Simulator
from lnpu.toolchain import ToolError
from verif.fake_chip import FAULTS, FakeChip, copy_command, end_command

WIDTHS = {64: TINY.replace(name="fake"), 256: TINY.replace(name="fake256", beat=8, lanes=8, axi_bits=256)}
PROGRAM = 0x80000


def simulator(width: int = 64, **options) -> Simulator:
    config = WIDTHS[width]
    sim = Simulator(config, 1 << 20, **options, top=FakeChip(config=config))
    sim.memory[:] = np.random.default_rng(1).integers(0, 256, sim.memory.size)
    return sim


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stall, latency", [(0.0, 8), (0.0, 1), (0.3, 20), (0.9, 3)])
def test_copy(width, stall, latency):
    sim = simulator(width, stall=stall, latency=latency, seed=7)
    expected = sim.memory.copy()
    words, word_bytes = 512, width // 8
    expected[0x40000 : 0x40000 + words * word_bytes] = expected[0x1000 : 0x1000 + words * word_bytes]
    expected[0x2000 : 0x2000 + words * word_bytes] = expected[0x40000 : 0x40000 + words * word_bytes]
    program = [copy_command(0x1000, 0x40000, words), copy_command(0x40000, 0x2000, words), end_command()]
    result = sim.run_program(PROGRAM, program)
    expected[PROGRAM : PROGRAM + 192] = np.frombuffer(b"".join(program), dtype=np.uint8)
    np.testing.assert_array_equal(sim.memory, expected)
    assert sim.bus_beats == (2 * words + 3 * 64 // word_bytes, 2 * words)
    assert result["flags"] == 0
    # Without stalls the memory delivers a word a cycle.
    overhead = 200
    assert 2 * words <= result["cycles"]
    assert stall or result["cycles"] < 2 * words + overhead


def test_same_seed_same_cycles():
    cycles = []
    for seed in (1, 1, 2):
        program = [copy_command(0, 0x40000, 256), end_command()]
        cycles.append(simulator(stall=0.5, seed=seed).run_program(PROGRAM, program)["cycles"])
    assert cycles[0] == cycles[1] != cycles[2]


def test_registers():
    sim = simulator()
    assert sim.read_register(Register.ID) == 0x4C4E5055
    sim.write_register(Register.PROGRAM_LENGTH, 0xDEADBEEF)
    assert sim.read_register(Register.PROGRAM_LENGTH) == 0xDEADBEEF
    with pytest.raises(BusError, match="read of register 0x3fc was answered with SLVERR"):
        sim.read_register(0x3FC)
    with pytest.raises(BusError, match="write of 0x5 to register 0x000 was answered with SLVERR"):
        sim.write_register(0, 5)


def test_chip_error_and_recovery():
    sim = simulator()
    with pytest.raises(ChipError, match=r"OPCODE \(code 1\) at command 1") as caught:
        sim.run_program(PROGRAM, [copy_command(0, 0x1000, 16), b"\xff" * 64])
    assert (caught.value.code, caught.value.command, caught.value.detail) == (Error.OPCODE, 1, (Error.OPCODE,))
    with pytest.raises(ChipError, match="LENGTH"):
        sim.run_program(PROGRAM, [copy_command(0, 0x1000, 16)])
    assert sim.run_program(PROGRAM, [end_command()])["cycles"] > 0


@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_injected_errors(stall):
    sim = simulator(stall=stall)
    program = [copy_command(0x1000, 0x40000, 256), end_command()]
    sim.memory[0x40000:0x41000] = 0
    sim.inject_errors(0x1200, 0x1201)
    with pytest.raises(ChipError, match="READ"):
        sim.run_program(PROGRAM, program)
    sim.memory[0x40000:0x41000] = 0
    sim.inject_errors(0x40100, 0x40108)
    with pytest.raises(ChipError, match="WRITE"):
        sim.run_program(PROGRAM, program)
    assert not sim.memory[0x40100:0x40108].any()
    np.testing.assert_array_equal(sim.memory[0x40108:0x40800], sim.memory[0x1108:0x1800])
    sim.inject_errors(0x1200, 0x1201, reads=False)
    sim.run_program(PROGRAM, program)
    sim.inject_errors(0, 0)
    sim.run_program(PROGRAM, program)


@pytest.mark.parametrize("source, dest, code", [(0x100000, 0, "READ"), (1 << 40 - 1, 0, "READ"), (0, 0xFFFF8, "WRITE")])
def test_out_of_range(source, dest, code):
    sim = simulator()
    program = [copy_command(source, dest & ~127, 32), end_command()]
    with pytest.raises(ChipError, match=code):
        sim.run_program(PROGRAM, program)


@pytest.mark.parametrize("fault, message", [
    ("no_last", "memory_write W: WLAST missing"),
    ("unstable_address", "memory_read AR: payload changed while valid and not ready"),
    ("unstable_data", "memory_write W: payload changed while valid and not ready"),
    ("wrong_size", "memory_read AR: size is not the bus width"),
])  # fmt: skip
def test_protocol_checks(fault, message):
    assert fault in FAULTS
    sim = simulator(stall=0.5)
    with pytest.raises(ProtocolError, match=message + r" \(cycle \d+\)"):
        sim.run_program(PROGRAM, [copy_command(0, 0x40000, 256, fault=fault), end_command()])
    with pytest.raises(ProtocolError):
        sim.read_register(Register.ID)


@pytest.mark.parametrize("source, message", [(0x1FC0, "crosses a 4 KiB"), (0x1004, "not a multiple of the bus width")])
def test_burst_checks(source, message):
    with pytest.raises(ProtocolError, match=message):
        simulator().run_program(PROGRAM, [copy_command(source, 0x40000, 16), end_command()])


def test_timeout():
    sim = simulator()
    with pytest.raises(SimulationTimeout, match=r"after 10\d\d cycles"):
        sim.run_program(PROGRAM, [copy_command(0, 0x1000, 16, fault="hang"), end_command()], max_cycles=1000)
    sim.reset()
    sim.run_program(PROGRAM, [copy_command(0, 0x1000, 16), end_command()])


def test_counters():
    sim = simulator()
    result = sim.run_program(PROGRAM, [copy_command(0, 0x40000, 256), end_command()])
    counters = sim.counters()
    assert list(counters) == list(COUNTERS)
    assert (counters["read_beats"], counters["write_beats"]) == sim.bus_beats == (256 + 16, 256)
    assert 0 <= result["cycles"] - counters["cycles"] <= 5
    sim.clear_counters()
    assert not any(sim.counters().values())


def test_trace(tmp_path):
    path = tmp_path / "waves.vcd"
    with simulator(trace=path) as sim:
        sim.run_program(PROGRAM, [copy_command(0, 0x40000, 16), end_command()])
    text = path.read_text()
    assert "$enddefinitions" in text and "memory_read__arvalid" in text and len(text) > 10_000


def test_second_build_is_cached():
    config = WIDTHS[64]
    first = build(config, top=FakeChip(config=config))
    modified = first.stat().st_mtime
    start = time.monotonic()
    assert build(config, top=FakeChip(config=config)) == first
    assert time.monotonic() - start < 5
    assert first.stat().st_mtime == modified


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_shared_modules(stall, monkeypatch):
    """With repeated modules translated once: the same results and counts in every cycle, in machines side by side."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(2, 16, 8, 8)).astype(np.float16)
    w = rng.normal(size=(16, 16, 3, 3)).astype(np.float16)
    options = {"stall": stall, "seed": 3, "memory_bytes": 1 << 20}
    paths = [build(TINY)]
    chips = [Chip(TINY, **options) for _ in range(2)]
    monkeypatch.setattr(build_module, "_SHARED", ())
    paths.append(build(TINY))
    assert paths[0] != paths[1]
    chips.append(Chip(TINY, **options))
    results = [chip.conv2d(x, w, padding=1) for chip in chips]
    chips[0].device.close()
    results.append(chips[1].conv2d(x, w, padding=1))
    for result in results:
        assert np.array_equal(result.view(np.uint16), golden.conv2d(x, w, padding=1).view(np.uint16))
    assert stall or chips[0].counters == chips[1].counters == chips[2].counters


def test_which_modules_are_shared(tmp_path):
    """Each of the patterns names a module of the chip, with its ports but for the clock."""
    emitted = emit_verilog(LnpuChip(config=TINY), tmp_path)
    for pattern in build_module._SHARED:
        assert any(fnmatchcase(path.stem, pattern) for path in emitted), pattern
    directives = build_module._sharing(emitted)
    pe = [line for line in directives.splitlines() if f'"lnpu_pe_{TINY.acc_bits}"' in line]
    ports = ("a", "b", "enable", "load", "pair", "psum_i", "psum_o", "rst")
    assert sorted(pe) == sorted(
        [
            f'no_inline -module "lnpu_pe_{TINY.acc_bits}"',
            *(f'public_flat_rd -module "lnpu_pe_{TINY.acc_bits}" -var "{port}"' for port in ports),
        ]
    )


def test_build_error_shows_the_log(monkeypatch, tmp_path):
    harness = tmp_path / "harness.cpp"
    harness.write_text("#error deliberately broken\n")
    monkeypatch.setattr(build_module, "HARNESS", harness)
    monkeypatch.setattr(build_module, "BUILD", tmp_path / "build")
    config = WIDTHS[64]
    with pytest.raises(BuildError, match="deliberately broken"):
        build(config, top=FakeChip(config=config))


def test_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    build_module._processor.cache_clear()
    with pytest.raises(ToolError, match="apt-get install g\\+\\+"):
        build(TINY)


def test_sources_of_the_chip_are_found():
    names = {path.name for path in build_module.imported_sources("lnpu.interfaces")}
    assert {"interfaces.py", "config.py", "formats.py", "commands.py"} <= names
    assert "simulator.py" not in names


@pytest.mark.parametrize("options", [{"memory_bytes": 1000}, {"stall": 1.0}, {"latency": 0}])
def test_bad_arguments(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Simulator(TINY, **options)


def test_bad_program():
    sim = simulator()
    with pytest.raises(ValueError, match="multiple of 64"):
        sim.run_program(32, 1)
    with pytest.raises(ValueError, match="64 bytes"):
        sim.run_program(0, [b"short"])
    with pytest.raises(ValueError, match="does not fit"):
        sim.run_program(sim.memory.size, [end_command()])


def test_models_end_in_any_order():
    """A simulation can end after others that began later; what is freed is overwritten, so that its use shows."""
    code = (
        "from lnpu.config import TINY\n"
        "from lnpu.sim.simulator import Simulator\n"
        "chips = [Simulator(TINY, 4096) for _ in range(3)]\n"
        "for index in (2, 0, 1):\n"
        "    chips[index].close()\n"
        "print('ended')\n"
    )
    build(TINY)  # not within the time that the simulations have
    environment = os.environ | {"MALLOC_PERTURB_": "165"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout == "ended\n", result.stderr


if __name__ == "__main__":  # how fast is the harness?
    fast = Simulator(TINY, top=FakeChip(config=TINY))
    begin = time.perf_counter()
    used = fast.run_program(32 << 20, [copy_command(0, 16 << 20, 1 << 20)] * 4 + [end_command()])["cycles"]
    sys.stdout.write(f"{used / (time.perf_counter() - begin):,.0f} cycles/s\n")
