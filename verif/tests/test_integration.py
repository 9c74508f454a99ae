"""Register map, headers, constraints, core file, and the example system."""

import ctypes
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from golden.fgmp import FP8_POLICY, FP16_POLICY, Policy, fgmp
from golden.memory import encode_block
from lnpu.config import PAPER, TINY
from lnpu.ctrl.commands import COMMAND_BYTES, Command, Opcode
from lnpu.ctrl.counters import COUNTERS
from lnpu.ctrl.registers import COUNTER_BASE, REGISTERS
from lnpu.export.headers import command_fields, commands_header, config_header
from lnpu.export.soc import EXAMPLE, run_soc
from lnpu.export.srams import srams
from lnpu.export.step import ExportedStep
from lnpu.export.systemrdl import system_rdl
from lnpu.export.write import write_register_views
from lnpu.synth.macros import Macro
from lnpu.synth.yosys import run_yosys
from lnpu.toolchain import RTL, verilator_environment
from lnpu.verilog import lint, write_verilog
from verif.fake_chip import FakeChip

pytest.importorskip("systemrdl", reason="needs systemrdl-compiler (`make setup-integration`)")
pytest.importorskip("peakrdl", reason="needs PeakRDL (`make setup-integration`)")

BUILD = RTL.parent / "build"


@pytest.fixture(scope="module")
def folder() -> Path:
    """Everything that `make integration` writes for `tiny`."""
    directory = BUILD / "integration-test"
    write_verilog(TINY, directory)
    write_register_views(directory)
    return directory


def gcc(directory: Path, source: str, *flags: str) -> subprocess.CompletedProcess:
    (directory / "test.c").write_text(source)
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", *flags, "test.c", "-o", "test"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True)


@pytest.mark.parametrize("config", [TINY, PAPER], ids=lambda config: config.name)
def test_system_rdl_is_the_register_table(tmp_path, config):
    from systemrdl import RDLCompiler
    from systemrdl.node import RegNode
    from systemrdl.rdltypes import AccessType, OnWriteType

    path = tmp_path / "lnpu.rdl"
    path.write_text(system_rdl(config))
    compiler = RDLCompiler()
    compiler.compile_file(str(path))
    found = {node.inst_name: node for node in compiler.elaborate().top.children() if isinstance(node, RegNode)}
    offsets = {name: register.offset for name, register in REGISTERS.items()}
    for index, name in enumerate(COUNTERS):
        offsets[f"COUNTER_{name.upper()}_LOW"] = COUNTER_BASE + 8 * index
        offsets[f"COUNTER_{name.upper()}_HIGH"] = COUNTER_BASE + 8 * index + 4
    assert {name: node.absolute_address for name, node in found.items()} == offsets
    software = {"r": AccessType.r, "rw": AccessType.rw, "w1c": AccessType.rw, "w": AccessType.w}
    for name, register in REGISTERS.items():
        fields = {node.inst_name: node for node in found[name].fields()}
        assert list(fields) == [field.name for field in register.fields]
        for field in register.fields:
            node = fields[field.name]
            assert (node.low, node.width) == (field.low, field.width)
            assert node.get_property("sw") is software[field.access]
            assert (node.get_property("onwrite") is OnWriteType.woclr) == (field.access == "w1c")
            assert node.get_property("reset") == (field.constant(config) if field.constant else 0)


def test_c_encoder_equals_the_python_encoder(tmp_path):
    """Random commands of every opcode, field by field through the macros; then values that do not fit."""
    rng = random.Random(1)
    (tmp_path / "lnpu_commands.h").write_text(commands_header())
    body, expected = [], b""
    for opcode in Opcode:
        places = [field for field in command_fields(opcode) if field[0] != "OPCODE"]
        for _ in range(8):
            values = {}
            body.append(f"    c = lnpu_command(LNPU_OPCODE_{opcode.name});")
            for name, _, width, signed in places:
                low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
                value = values[name] = rng.choice([low, high, rng.randint(low, high)])
                literal = f"(int64_t){value & (1 << 64) - 1:#x}u"
                body.append(f"    if (!LNPU_SET(&c, {opcode.name}, {name}, {literal})) return 1;")
                if width < 64:
                    body.append(f"    if (LNPU_GET(&c, {opcode.name}, {name}) != {literal}) return 2;")
                    body.append(f"    if (LNPU_SET(&c, {opcode.name}, {name}, {high + 1})) return 3;")
            body.append("    if (fwrite(&c, 1, sizeof c, stdout) != sizeof c) return 4;")
            if "KMASK_0" in values:
                values["KMASK"] = values.pop("KMASK_0") | values.pop("KMASK_1") << 64
            expected += Command(opcode, **{name.lower(): value for name, value in values.items()}).encode()
    source = "\n".join(
        ['#include <stdio.h>', '#include "lnpu_commands.h"', "int main(void) {", "    lnpu_command_t c;", *body,
         "    return 0;", "}", ""]
    )  # fmt: skip
    compiled = gcc(tmp_path, source)
    assert compiled.returncode == 0, compiled.stderr
    result = subprocess.run([str(tmp_path / "test")], capture_output=True)
    assert result.returncode == 0
    assert len(expected) == 8 * len(Opcode) * COMMAND_BYTES
    assert result.stdout == expected


def test_headers_compile_together_and_agree_with_the_tables(folder, tmp_path):
    checks = [
        *(f"offsetof(lnpu_t, {name}) == {register.offset}" for name, register in REGISTERS.items()),
        *(
            f"LNPU__{name}__{field.name.upper()}_bm == {((1 << field.width) - 1) << field.low:#x}u"
            for name, register in REGISTERS.items()
            for field in register.fields
        ),
        f"offsetof(lnpu_t, COUNTER_CYCLES_LOW) == {COUNTER_BASE}",
        f"LNPU_CONFIG_COUNTERS == {len(COUNTERS)}",
        *(f"LNPU_CONFIG_{name.upper()} == {int(value)}" for name, value in asdict(TINY).items() if name != "name"),
        "LNPU__SHAPE0__CORES_reset == LNPU_CONFIG_CORES",
    ]
    source = "\n".join(
        ["#include <stddef.h>", '#include "lnpu_config.h"', '#include "lnpu_commands.h"', '#include "lnpu_registers.h"',
         *(f'static_assert({check}, "{check}");' for check in checks), "int main(void) { return 0; }", ""]
    )  # fmt: skip
    compiled = gcc(tmp_path, source, f"-I{folder}")
    assert compiled.returncode == 0, compiled.stderr
    assert gcc(tmp_path, source.replace("LNPU_CONFIG_CORES == 2", "LNPU_CONFIG_CORES == 3"), f"-I{folder}").returncode
    assert config_header(PAPER) != config_header(TINY)


def test_files_are_deterministic(folder):
    names = (
        "lnpu.rdl",
        "lnpu_commands.h",
        "lnpu_config.h",
        "lnpu.sdc",
        "lnpu.core",
        "SRAMS.md",
        "lint_waivers.vlt",
        "clock/lnpu_clock_gate.v",
    )
    before = {name: (folder / name).read_bytes() for name in names}
    write_verilog(TINY, folder)
    assert before == {name: (folder / name).read_bytes() for name in names}
    assert (folder / "registers" / "index.html").exists()


def test_srams_are_those_of_the_elaborated_design(folder):
    """Against Yosys' count of instances, through all levels of hierarchy."""
    pytest.importorskip("pyosys")
    files = sorted(folder.glob("lnpu_*.v"))
    reads = [f'read_verilog -defer "{path}"' for path in [*files, *folder.glob("*/lnpu_*.v")]]
    listing = folder / "srams.txt"
    passes = [*reads, "hierarchy -check -top lnpu_chip", "blackbox *lnpu_sram_1r1w*", "flatten",
              f"tee -q -o {listing} select -list lnpu_chip/t:*lnpu_sram_1r1w*"]  # fmt: skip
    run_yosys(passes)
    found = srams(files)
    assert sum(found.values()) == len(listing.read_text().splitlines())
    assert found[Macro(TINY.vmem_rows // TINY.vmem_banks, 32 * TINY.beat, 32 * TINY.beat)] == TINY.vmem_banks


def test_sdc_constrains_every_port(folder, tmp_path):
    """OpenSTA reads it on a netlist with the chip's ports and reports no port without a constraint."""
    liberty = Path("/usr/share/qflow/tech/osu018/osu018_stdcells.lib")
    if shutil.which("sta") is None or not liberty.exists():
        pytest.skip("needs OpenSTA and qflow's cells: run `apt-get install opensta qflow-tech-osu018`")
    ports = [row.split("|") for row in (folder / "PORTS.md").read_text().splitlines() if row.startswith("| `")]
    declarations, cells, number = [], [], 0
    for _, name, direction, width, *_ in ports:
        name, direction, bits = name.strip(" `"), direction.strip(), int(width)
        declarations.append(f"  {direction} {f'[{bits - 1}:0] ' if bits > 1 else ''}{name};")
        for bit in range(bits if name != "clk" else 0):
            net = f"{name}[{bit}]" if bits > 1 else name
            data, out = ("rst", net) if direction == "output" else (net, f"n{number}")
            cells.append(f"  DFFPOSX1 f{number} (.CLK(clk), .D({data}), .Q({out}));")
            number += 1
    names = ", ".join(name.strip(" `") for _, name, *_ in ports)
    netlist = "\n".join([f"module lnpu_chip ({names});", *declarations, *cells, "endmodule", ""])
    (tmp_path / "chip.v").write_text(netlist)
    script = f"""read_liberty {liberty}
read_verilog chip.v
link_design lnpu_chip
read_sdc {folder / "lnpu.sdc"}
check_setup -verbose -no_input_delay -unconstrained_endpoints -no_clock
report_checks -path_delay max
puts "end of script"
exit
"""

    def run(script: str) -> str:
        (tmp_path / "run.tcl").write_text(script)
        result = subprocess.run(
            ["sta", "-no_init", "-exit", "run.tcl"], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        return result.stdout + result.stderr

    log = run(script)
    assert "end of script" in log, log
    assert "Error" not in log and "Warning" not in log, log
    assert "clk (rise edge)" in log and "slack" in log, log
    assert "Warning" in run(script.replace(f"read_sdc {folder / 'lnpu.sdc'}", "create_clock -period 1 clk")), (
        "the check finds nothing without the constraints"
    )


def test_fusesoc_finds_and_lints_the_core(folder, tmp_path):
    pytest.importorskip("fusesoc", reason="needs FuseSoC (`make setup-integration`)")
    command = [sys.executable, "-m", "fusesoc.main", "--cores-root", str(folder)]
    environment = verilator_environment()
    listed = subprocess.run([*command, "core", "list"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "lnpu:lnpu:tiny:0.1.0" in listed.stdout, listed.stderr
    run = subprocess.run(
        [*command, "run", "--target", "lint", "lnpu:lnpu:tiny"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "%Warning" not in run.stdout + run.stderr
    assert "deprecated" not in run.stdout + run.stderr


def test_example_system_lint(tmp_path):
    chip = write_verilog(TINY, tmp_path, top=FakeChip(config=TINY))
    files = [*sorted((RTL.parent / "examples" / "soc").glob("*.v")), *chip]
    assert lint(files, top="lnpu_soc") == []


@pytest.fixture(scope="module")
def encode_in_c(tmp_path_factory):
    """The example's encoder: (64 float32 values, policy) to bytes."""
    library = tmp_path_factory.mktemp("fgmp") / "fgmp.so"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run(["gcc", *flags, "-shared", "-fPIC", str(EXAMPLE / "fgmp.c"), "-lm", "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).fgmp_encode_block

    class CPolicy(ctypes.Structure):
        _fields_ = [("scale", ctypes.c_int), ("lo", ctypes.c_uint16), ("hi", ctypes.c_uint16),
                    ("below", ctypes.c_int), ("above", ctypes.c_int)]  # fmt: skip

    def encode(values, policy):
        choices = ("fp16", "fp8", "zero")
        given = CPolicy(
            policy.scale, policy.lo_bits, policy.hi_bits, choices.index(policy.below), choices.index(policy.above)
        )
        out = (ctypes.c_uint8 * 145)()
        data = np.ascontiguousarray(values, np.float32)
        length = function(out, data.ctypes.data_as(ctypes.c_void_p), ctypes.byref(given))
        return bytes(out[:length])

    return encode


def test_c_encoder_of_every_half(encode_in_c):
    """Every FP16 pattern in FP16, in FP8, and with limits in between."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).reshape(-1, 64)
    for policy in (
        FP16_POLICY,
        FP8_POLICY,
        Policy.between(2.0**-6, 64.0, below="zero"),
        Policy.between(2.0**-3, 448.0),
    ):
        for block in values:
            expected = fgmp(block, policy)
            assert encode_in_c(block, policy) == encode_block(expected.bits, expected.codes), (block, policy)


def test_c_encoder_of_blocks(encode_in_c):
    """Random blocks of every density and share of FP16, of FP32 values, under random policies."""
    rng = np.random.default_rng(2)
    for _ in range(2000):
        lo, hi = sorted(int(bits) for bits in rng.integers(0x8000, size=2))
        policy = Policy(
            int(rng.integers(-20, 20)), lo, hi, rng.choice(["fp16", "fp8", "zero"]), rng.choice(["fp16", "fp8"])
        )
        values = rng.standard_normal(64) * 2.0 ** rng.integers(-30, 30, 64)
        values *= rng.random(64) < rng.choice([0, 0.1, 0.5, 1])
        if rng.random() < 0.3:  # ties of FP16
            values = np.round(values * 2048) / 2048
        values = values.astype(np.float32)
        expected = fgmp(values, policy)
        assert encode_in_c(values, policy) == encode_block(expected.bits, expected.codes), (values, policy)


def test_steps_from_c_are_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        ExportedStep(TINY, steps=0)
    with pytest.raises(ValueError, match="formats must be one of dynamic"):
        ExportedStep(TINY, formats="fp4")


@pytest.mark.parametrize("formats", ["fp16", "fgmp"])
def test_static_step_from_c(formats):
    result = run_soc(TINY, BUILD / "soc", formats=formats, steps=1)
    assert result.mismatches == 0, result.tensors


def test_training_steps_from_c():
    """Dynamic FGMP: the second step stores with scales and limits that the chip has set after the first one."""
    result = run_soc(TINY, BUILD / "soc")
    assert result.output.count("loss ") == 2
    assert result.mismatches == 0, result.tensors
    assert result.elements > 5000
    assert {"w.conv", "master.fc", "momentum.conv", "fc", "d.fc"} <= set(result.tensors)
    assert "own program: 2 commands" in result.output
    after = bytearray((BUILD / "soc" / "after.bin").read_bytes())
    step = ExportedStep(TINY)
    after[step.step.weights["conv"].master.address] ^= 1
    assert sum(wrong for wrong, _ in step.check(bytes(after)).values()) == 1
    with pytest.raises(ValueError, match=f"must be {step.size} bytes"):
        step.check(b"")


def test_example_system_refuses_other_buses(tmp_path):
    with pytest.raises(ValueError, match="axi_bits of paper is"):
        run_soc(PAPER, tmp_path)
