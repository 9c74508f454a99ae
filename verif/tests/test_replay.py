"""Replay of a training step, operation by operation: all are right, and what is wrong is noticed, kept and reported."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("distributed")

import dask

from golden.fgmp import CODE_FP16
from lnpu.cli import main
from lnpu.compiler.tensor import RawTensor, Tensor
from lnpu.compiler.traffic import Traffic
from lnpu.config import TINY
from lnpu.ctrl.commands import COMMAND_BYTES, Command, Opcode
from lnpu.replay import run as run_module
from lnpu.replay import simulate as simulate_module
from lnpu.replay.plan import GoldenStep, load, plan
from lnpu.replay.run import choose, is_wrong, replay, table
from lnpu.replay.simulate import AFTER, BEFORE, simulate
from lnpu.train_step import Settings

SMALL = Settings(width=8, image=16, batch=4, steps=2, stem="imagenet", loss_scale=16.0)
ARGUMENTS = [
    "replay", "--config", "tiny", "--width", "8", "--image", "16", "--batch", "4", "--step", "2", "--stem", "imagenet",
    "--loss-scale", "16",
]  # fmt: skip
FEW = "forward stem"


@pytest.fixture(scope="module")
def golden_step():
    return GoldenStep.compute(SMALL, TINY, load(SMALL))


@pytest.fixture(scope="module")
def segments(golden_step):
    return {segment.title: segment for segment in plan(golden_step)}


@pytest.fixture
def folder(golden_step, tmp_path):
    """Images of memory, for a test to change."""
    golden_step.write(tmp_path)
    return tmp_path


def change(folder: Path, file: str, address: int, *values: int) -> None:
    memory = np.memmap(folder / file, np.uint8, "r+")
    assert (memory[address : address + len(values)] != values).any()
    memory[address : address + len(values)] = values
    memory.flush()


def written(segment, kind: type):
    return next(tensor for tensor in segment.writes if isinstance(tensor, kind))


def test_whole_step(golden_step, segments, tmp_path, capsys):
    """Every segment of every program, through the command line; then again, where all is there."""
    results, file = tmp_path / "results", tmp_path / "report.json"
    arguments = [*ARGUMENTS, "--results", str(results), "--json", str(file)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"[{len(segments)}/{len(segments)}]" in out and "0 segments wrong" in out and "cycles/dense" in out
    text = file.read_text()
    report = json.loads(text)
    assert str(tmp_path) not in text and "data" not in report["settings"]
    assert report["wrong"] == 0 and not report["failed"]
    step = golden_step.step
    programs = (step.forward, step.backward, step.update)
    assert len(report["segments"]) == len(segments) == sum(len(program.marks) - 1 for program in programs)
    assert {tensor.name for segment in segments.values() for tensor in segment.writes} == set(golden_step.after)
    assert {name for segment in segments.values() for name, _ in segment.records} == set(golden_step.records)
    assert sum(len(program.commands) for program in programs) == sum(
        result["commands"] for result in report["segments"]
    ) + 2 * len(programs)  # and the first MARK and END
    for result in report["segments"]:
        assert result["counters"]["cycles"] > 0 and result["elements"] > 0 and result["traffic"]
        assert (result["macs_dense"] > 0) == (result["phase"] in ("ff", "bp", "wg"))
    for name in ("cycles", "mac8", "segments", "write_bits", "elements", "macs_dense"):
        assert report["total"][name] == sum(row[name] for row in report["rows"])
        assert report["total"][name] == sum(phase[name] for phase in report["phases"].values())
    ideal = (report["total"]["mac16"] + report["total"]["mac8"] / 2) / TINY.macs_fp16
    assert report["total"]["ideal_cycles"] == pytest.approx(ideal, abs=0.1)
    assert report["phases"]["ff"]["dense_cycles"] * TINY.macs_fp16 == report["phases"]["ff"]["macs_dense"]
    assert not list(results.glob("memory-*"))

    times = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    one, other = list(times)[3:5]
    one.unlink()
    result = json.loads(other.read_text())
    other.write_text(json.dumps(result | {"errors": ["it went wrong"]}))
    kept = {path: path.stat().st_mtime_ns for path in times if path != one}
    assert main(arguments) == 1  # what was wrong still is
    out = capsys.readouterr().out
    assert f"{len(segments) - 1} of them finished before" in out and out.count("\n[") == 1
    assert "1 segments wrong" in out
    assert {path: path.stat().st_mtime_ns for path in times if path != one} == kept and one.exists()


def test_dense():
    """Batch norms can begin so that no ReLU cuts anything: then no operand has zeros of its own."""
    settings = dataclasses.replace(SMALL, formats="fp16", dense=True, batch=2, steps=1)
    step = GoldenStep.compute(settings, TINY, load(settings))
    for name in step.step.relu:
        assert (step.after[name].codes == CODE_FP16).all(), name


def test_keys(golden_step, segments, monkeypatch):
    """A result is taken for that of a segment whose commands, tensors and chip are the same, and of no other."""

    def changed() -> set[str]:
        names = {segment.name for segment in segments.values()}
        return {segment.title for segment in plan(golden_step) if segment.name not in names}

    assert changed() == set()
    program = golden_step.step.forward
    at = next(i for i, command in enumerate(program.commands) if command.opcode is Opcode.MULTIPLY)
    fields = program.commands[at].fields
    other = Command(Opcode.MULTIPLY, **fields | {"lanes": fields["lanes"] - 1})
    with monkeypatch.context() as patch:
        patch.setattr(program, "commands", [*program.commands[:at], other, *program.commands[at + 1 :]])
        assert changed() == {"forward stem.conv ff"}
    for name, tensors in (("w.fc", golden_step.before), ("d.fc", golden_step.before), ("fc", golden_step.after)):
        value = tensors[name]
        patched = value.copy() if isinstance(value, np.ndarray) else dataclasses.replace(value, codes=value.codes ^ 1)
        if isinstance(value, np.ndarray):
            patched.flat[0] += 1
        with monkeypatch.context() as patch:
            patch.setitem(tensors, name, patched)
            found = changed()
        assert found and all(" fc" in title for title in found), name
    with monkeypatch.context() as patch:
        patch.setattr(golden_step.step, "config", TINY.replace(acc_bits=100))
        assert changed() == set(segments)


def test_states(golden_step, segments):
    """The step is one in which states have moved, and segments start from what holds then."""
    assert not golden_step.overflow
    moved = [name for name, state in golden_step.stored.items() if golden_step.used[name] != state]
    assert moved
    numbers = {tensor.name: tensor.state for tensor, _ in golden_step.step.dynamic}
    name = moved[0]
    layer, number = name.removeprefix("w."), numbers[name]
    before, used = golden_step.stored[name], golden_step.used[name]
    assert (number, before.scale, before.lo, before.hi) in segments[f"forward {layer} ff"].states
    assert (number, used.scale, used.lo, used.hi) in segments[f"update {layer} update"].states


@pytest.mark.parametrize("title", ["forward layer2.0.conv1 ff", "backward layer1.0.relu2 vector"])
def test_right(title, segments, folder):
    result = simulate(segments[title], TINY, str(folder))
    assert not is_wrong(result) and result["elements"] > 300


def test_wrong_operand(segments, folder):
    segment = segments["forward layer2.0.conv1 ff"]
    weight = next(operand.tensor for operand in segment.reads if operand.tensor.name.startswith("w."))
    memory = np.memmap(folder / BEFORE, np.uint8)
    payload = weight.slots + int(memory[weight.table]) - 1
    change(folder, BEFORE, payload, memory[payload] ^ 0x08)
    result = simulate(segment, TINY, str(folder))
    assert is_wrong(result) and "layer2.0.conv1" in result["mismatches"] and not result["errors"]


def test_wrong_expectation(segments, folder):
    """One bit each of an FP32 vector, of an encoded element and of a record."""
    segment = segments["forward layer2.0.conv1 ff"]
    memory = np.memmap(folder / AFTER, np.uint8)
    raw, encoded, (name, record) = written(segment, RawTensor), written(segment, Tensor), segment.records[0]
    payload = encoded.slots + int(memory[encoded.table]) - 1
    for address in (raw.address, payload, record):
        change(folder, AFTER, address, memory[address] ^ 0x08)
    result = simulate(segment, TINY, str(folder))
    assert result["mismatches"] == {raw.name: 1, encoded.name: 1, f"{name} (record)": 1}
    assert not result["errors"] and not result["unpredicted"] and not result["stray"]


def test_wrong_traffic(segments, folder, monkeypatch):
    counters = Traffic.counters
    monkeypatch.setattr(
        Traffic, "counters", lambda self: (bits := counters(self)) | {"read_bits_weight": bits["read_bits_weight"] + 8}
    )
    result = simulate(segments["forward fc ff"], TINY, str(folder))
    assert is_wrong(result) and result["unpredicted"] == {"read_bits_weight": -8} and not result["mismatches"]


def find(segment, folder: Path, opcode: Opcode) -> tuple[int, Command]:
    """Address and contents of a segment's first command of a kind."""
    memory = np.memmap(folder / BEFORE, np.uint8)
    for index in range(segment.count):
        address = segment.address + COMMAND_BYTES * index
        command = Command.decode(memory[address : address + COMMAND_BYTES].tobytes())
        if command.opcode is opcode:
            return address, command
    raise AssertionError(f"no {opcode.name}")


def test_missing_and_stray_results(segments, folder):
    segment = segments["forward layer2.0.conv1 ff"]
    address, command = find(segment, folder, Opcode.STORE)
    change(folder, BEFORE, address, *Command(Opcode.NOP, wait_units=command.fields["wait_units"]).encode())
    address, command = find(segment, folder, Opcode.STORE_RAW)
    moved = command.fields | {"address": segments["forward fc ff"].writes[0].address}
    change(folder, BEFORE, address, *Command(Opcode.STORE_RAW, **moved).encode())
    result = simulate(segment, TINY, str(folder))
    assert result["stray"] > 0 and any("malformed" in error for error in result["errors"])
    assert "layer2.0.conv1" in result["mismatches"] and len(result["mismatches"]) > 1


def test_chip_errors(segments, folder, monkeypatch):
    segment = segments["forward fc ff"]
    with monkeypatch.context() as patch:
        patch.setattr(simulate_module, "_SLICE", 10)
        (text,) = simulate(segment, TINY, str(folder))["errors"]
        assert text.startswith("SimulationTimeout: command")
    weight = next(operand.tensor for operand in segment.reads if operand.tensor.name == "w.fc")
    change(folder, BEFORE, weight.table, 200)
    result = simulate(segment, TINY, str(folder))
    assert is_wrong(result) and result["errors"][0].startswith("ChipError: DECODE")


def test_plan_refuses(golden_step, monkeypatch):
    step = golden_step.step
    operation = step.operations(step.forward)[1]
    monkeypatch.setattr(operation, "outputs", ["fc"])
    with pytest.raises(ValueError, match=r"forward stem\.conv ff writes stem\.conv.*, not fc"):
        plan(golden_step)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.delitem(golden_step.after, "stem.conv")
        with pytest.raises(ValueError, match=r"writes stem\.conv, of which there is no golden copy"):
            plan(golden_step)
    monkeypatch.delitem(golden_step.before, "images")
    with pytest.raises(ValueError, match="reads images, which nothing has written yet"):
        plan(golden_step)


def test_choose(segments):
    everything = list(segments.values())
    assert choose(everything) == everything
    assert [segment.title for segment in choose(everything, r"layer1\.0\.conv1 (ff|wg)")] == [
        "forward layer1.0.conv1 ff", "backward layer1.0.conv1 wg",
    ]  # fmt: skip
    distinct = choose(everything, distinct=True)
    shapes = {segment.shape for segment in everything if segment.shape}
    assert len(shapes) == 1 + 1 + 3 * 3 + 1  # stem, stage 1, stages 2 to 4: first, others, shortcut; linear
    assert {(segment.phase, segment.shape) for segment in distinct} == {
        (phase, shape) for phase in ("ff", "bp", "wg", "update") for shape in shapes
    } - {("bp", segments["forward stem.conv ff"].shape)}
    assert len(distinct) == 4 * len(shapes) - 1


def test_failed_and_killed_workers(tmp_path, monkeypatch):
    """An exception is reported, and does not stop other segments; a killed worker's segment goes to another."""
    once = tmp_path / "killed"

    def unreliable(segment, config, folder):
        if segment.layer == "stem.pool":
            raise OSError("the disk is full")
        if segment.layer == "stem.relu" and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return simulate(segment, config, folder)

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "simulate", unreliable)
        report = replay(SMALL, TINY, tmp_path / "results", workers=1, only=FEW, tell=lines.append)
    assert once.exists()
    assert report["failed"] == {"forward stem.pool vector": "OSError('the disk is full')"} and report["wrong"] == 1
    assert [result["layer"] for result in report["segments"]] == ["stem.conv", "stem.relu"]
    assert "forward stem.pool vector has failed: OSError('the disk is full')" in lines
    assert table(report).splitlines()[-1].startswith("all")
    report = replay(SMALL, TINY, tmp_path / "results", workers=1, only=FEW, tell=lines.append)
    assert not report["wrong"] and len(report["segments"]) == 3 and "3 segments, 2 of them finished before" in lines


def test_killed_run_goes_on(segments, tmp_path, capsys):
    expression = "backward layer1"
    count = len(choose(list(segments.values()), expression))
    arguments = [*ARGUMENTS, "--only", expression, "--workers", "1", "--results", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "lnpu.cli", *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("backward-*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait(30)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("backward-*.json")}
    assert 1 <= len(finished) < count and list(tmp_path.glob("memory-*"))
    assert main(arguments) == 0
    assert f"{count} segments, {len(finished)} of them finished before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list(tmp_path.glob("*.json"))) == count and not list(tmp_path.glob("memory-*"))


def test_external_scheduler(tmp_path, scheduler, capsys):
    results = ["--results", str(tmp_path / "results")]
    assert main([*ARGUMENTS, "--only", FEW, "--scheduler", scheduler, *results]) == 0
    assert "3 segments, 0 mismatches" in capsys.readouterr().out
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        assert main([*ARGUMENTS, "--only", FEW, "--scheduler", "tcp://127.0.0.1:1", *results]) == 0  # asks no one
        assert main([*ARGUMENTS, "--only", "^forward fc", "--scheduler", "tcp://127.0.0.1:1", *results]) == 2
    assert "lnpu replay: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "huge"], "configuration must be one of tiny, edge, paper, not 'huge'"),
        (["--batch", "0"], "batch must be at least 1, not 0"),
        (["--step", "0"], "step must be at least 1, not 0"),
        (["--workers", "0"], "workers must be at least 1, not 0"),
        (["--formats", "fp4"], "formats must be one of dynamic, fgmp, fp16, fp8, not 'fp4'"),
        (["--acc-bits", "20"], "acc_bits must be 84 to 128, not 20"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--only", "("], "--only must be a regular expression"),
        (["--only", "nothing"], "no segment matches 'nothing'"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    results = tmp_path / "results"
    assert main([*ARGUMENTS, *arguments, "--results", str(results)]) == 2
    assert message in capsys.readouterr().err and not results.exists()
