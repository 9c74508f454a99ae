"""The `lnpu` command: what its users type, and what they get wrong."""

import json

import numpy as np
import pytest

import golden
from lnpu.cli import main
from lnpu.compiler.policies import FORMATS, get_formats
from lnpu.train_step import Settings


@pytest.fixture
def operands(tmp_path):
    rng = np.random.default_rng(3)
    arrays = {
        "x": rng.standard_normal((2, 5, 6, 6)).astype(np.float16),
        "w": rng.standard_normal((7, 5, 3, 3)).astype(np.float16),
        "dy": rng.standard_normal((2, 7, 3, 3)).astype(np.float16),
        "fx": rng.standard_normal((3, 9)).astype(np.float16),
        "fw": rng.standard_normal((4, 9)).astype(np.float16),
        "fdy": rng.standard_normal((3, 4)).astype(np.float16),
    }
    paths = {}
    for name, array in arrays.items():
        paths[name] = str(tmp_path / f"{name}.npy")
        np.save(paths[name], array)
    return arrays, paths, str(tmp_path / "out.npy")


OPERATIONS = {
    "conv2d": (["--x", "x", "--w", "w", "--stride", "2", "--padding", "1"], (2, 7, 3, 3)),
    "conv2d-input-grad": (
        ["--dy", "dy", "--w", "w", "--stride", "2", "--padding", "1", "--input-shape", "2,5,6,6"],
        (2, 5, 6, 6),
    ),
    "conv2d-weight-grad": (
        ["--x", "x", "--dy", "dy", "--stride", "2", "--padding", "1", "--kernel-shape", "3,3"],
        (7, 5, 3, 3),
    ),
    "linear": (["--x", "fx", "--w", "fw"], (3, 4)),
    "linear-input-grad": (["--dy", "fdy", "--w", "fw"], (3, 9)),
    "linear-weight-grad": (["--x", "fx", "--dy", "fdy"], (4, 9)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(operation, operands, capsys):
    arrays, paths, out = operands
    arguments, shape = OPERATIONS[operation]
    arguments = [paths.get(word, word) for word in arguments]
    assert main(["op", operation, *arguments, "--check", "-o", out]) == 0
    result = np.load(out)
    assert result.shape == shape and result.dtype == np.float16
    assert "0 mismatches" in capsys.readouterr().out
    if operation == "conv2d":
        expected = golden.conv2d(arrays["x"], arrays["w"], stride=2, padding=1)
        np.testing.assert_array_equal(result.view(np.uint16), expected.view(np.uint16))


def test_operation_formats(operands, capsys):
    _, paths, out = operands
    formats = ["--x-format", "0.25:2:1:zero:fp8", "--w-format", "fp8", "--out", "fp32", "--stall", "0.3"]
    assert main(["op", "conv2d", "--x", paths["x"], "--w", paths["w"], *formats, "--check", "-o", out]) == 0
    assert np.load(out).dtype == np.float32
    assert "zeros skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["op", "conv2d", "--x", "x", "-o", "out"], "--w is missing"),
        (["op", "conv2d", "--x", "x", "--w", "fw", "-o", "out"], "w must have 4 dimensions"),
        (["op", "conv2d", "--x", "missing", "--w", "w", "-o", "out"], "--x must be an .npy file"),
        (["op", "conv2d", "--x", "x", "--w", "w", "--stride", "0", "-o", "out"], "stride must be at least 1, not 0"),
        (["op", "conv2d", "--x", "x", "--w", "w", "--padding", "-1", "-o", "out"], "padding must be 0 or more, not -1"),
        (["op", "conv2d-input-grad", "--dy", "dy", "--w", "w", "-o", "out"], "--input-shape is missing"),
        (["op", "conv2d", "--config", "huge", "--x", "x", "--w", "w", "-o", "out"], "not 'huge'"),
        (["train-step", "--config", "huge"], "configuration must be one of tiny, edge, paper, not 'huge'"),
        (["train-step", "--batch", "0"], "batch must be at least 1, not 0"),
        (["train-step", "--formats", "fp4"], "formats must be one of dynamic, fgmp, fp16, fp8, not 'fp4'"),
        (["train-step", "--data", "/nowhere"], "/nowhere"),
        (["verilog", "--config", "huge"], "not 'huge'"),
        (["info", "huge"], "not 'huge'"),
    ],
)
def test_bad_input(arguments, message, operands, capsys):
    paths = operands[1] | {"out": operands[2]}
    assert main([paths.get(word, word) for word in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["fp4", "1", "2:1", "0.1:1", "0:1:0:up", "0:1:x"])
def test_bad_format(text, operands, capsys):
    _, paths, out = operands
    with pytest.raises(SystemExit):
        main(["op", "conv2d", "--x", paths["x"], "--w", paths["w"], "--x-format", text, "-o", out])
    assert "--x-format" in capsys.readouterr().err


@pytest.mark.parametrize("formats", ["dynamic", "fp8"])
def test_train_step(formats, tmp_path, capsys):
    """Two small training steps; what they print, and the report they leave."""
    arguments = ["--width", "4", "--batch", "2", "--steps", "2", "--formats", formats, "-o", str(tmp_path)]
    assert main(["train-step", *arguments]) == 0
    out = capsys.readouterr().out
    assert "0 mismatches" in out and "utilisation" in out and "EMA" in out and "index.html" in out.replace("\n", "")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["mismatches"] == 0 and report["elements"] > 50_000
    assert report["ema_unpredicted_bits"] == 0
    host = 2 * (2 * 8 * 8 + 2 * 10)  # images and the loss gradient; every other tensor is an operation's
    assert sum(op["elements"] for op in report["ops"]) + host == report["elements"]
    assert set(report["ema_bits"]) == {"fgmp", "fp16"}
    assert {op["phase"] for op in report["ops"]} == {"ff", "bp", "wg", "update", "vector"}
    assert report["steps"][0]["loss"] == report["steps"][0]["golden_loss"]
    for op in report["ops"]:
        assert op["elements"] > 0 and op["cycles"] > 0
        if op["phase"] in ("ff", "wg"):
            assert 0 < op["macs_issued"] < op["macs_dense"]
    assert (tmp_path / "index.html").read_text().startswith("<!DOCTYPE html>")


def test_info(capsys):
    assert main(["info"]) == 0
    assert "paper: 768 FP16 MACs a cycle" in capsys.readouterr().out
    assert main(["info", "tiny", "--registers", "--commands"]) == 0
    out = capsys.readouterr().out
    assert "PROGRAM_LENGTH" in out and "MULTIPLY (0x06)" in out and "lanes = 8" in out


def test_settings():
    assert get_formats("fp16") == FORMATS["fp16"]
    for name in ("width", "image", "batch", "steps"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            Settings(**{name: 0})
    with pytest.raises(ValueError, match="rate"):
        Settings(rate=0.0)
