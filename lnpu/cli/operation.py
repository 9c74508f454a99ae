"""One operation on the simulated chip: `op`."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from golden.fgmp import POLICIES, Policy
from lnpu.cli.arguments import Subparsers, config_argument

__all__ = ["add"]

_OPERATIONS = {
    "conv2d": ("x", "w"),
    "conv2d-input-grad": ("dy", "w"),
    "conv2d-weight-grad": ("x", "dy"),
    "linear": ("x", "w"),
    "linear-input-grad": ("dy", "w"),
    "linear-weight-grad": ("x", "dy"),
}


def add(commands: Subparsers) -> None:
    """Add the commands."""
    op = commands.add_parser(
        "op",
        help="one operation on the simulated chip",
        description="Runs one operation on the simulated chip. Arrays are .npy files (float16 or float32): NCHW, OIHW.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    op.add_argument("operation", choices=_OPERATIONS)
    config_argument(op, "tiny")
    for name in ("x", "w", "dy"):
        op.add_argument(f"--{name}", type=Path, help=f"operand {name} (.npy)")
        op.add_argument(
            f"--{name}-format",
            type=_format,
            default="fp16",
            metavar="FORMAT",
            help=f"format of {name}: fp16, fp8 or LO:HI[:SCALE[:BELOW[:ABOVE]]]",
        )
    op.add_argument("--stride", type=int, default=1)
    op.add_argument("--padding", type=int, default=0)
    op.add_argument("--input-shape", type=_shape, help="N,C,H,W of x (conv2d-input-grad)")
    op.add_argument("--kernel-shape", type=_shape, help="R,S of w (conv2d-weight-grad)")
    op.add_argument("--out", default="fp16", choices=("fp16", "fp32"), help="format of the result")
    op.add_argument("--out-scale", type=int, default=0, help="exponent that the result is divided by")
    op.add_argument("--stall", type=float, default=0.0, help="probability of a stall a cycle on every AXI channel")
    op.add_argument("--check", action="store_true", help="compare with the golden model; exit status 1 on a mismatch")
    op.add_argument("-o", "--output", type=Path, required=True, help="result (.npy)")
    op.set_defaults(run=_op)


def _format(text: str) -> str | Policy:
    """A format of the command line: "fp16", "fp8", or LO:HI[:SCALE[:BELOW[:ABOVE]]]."""
    if text in POLICIES:
        return text
    parts = text.split(":")
    if not 2 <= len(parts) <= 5:
        raise argparse.ArgumentTypeError(f"must be fp16, fp8 or LO:HI[:SCALE[:BELOW[:ABOVE]]], not {text!r}")
    try:
        names = dict(zip(("below", "above"), parts[3:], strict=False))
        scale = int(parts[2]) if len(parts) > 2 else 0
        return Policy.between(float(parts[0]), float(parts[1]), scale=scale, **names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas, not {text!r}") from None


def _load(name: str, path: Path | None) -> Any:
    if path is None:
        raise ValueError(f"--{name} is missing")
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{name} must be an .npy file: {path}: {error}") from None


def _op(arguments: argparse.Namespace) -> int:
    import golden
    from lnpu.sim import Chip

    operation = arguments.operation
    operands = [_load(name, getattr(arguments, name)) for name in _OPERATIONS[operation]]
    options: dict[str, Any] = {
        f"{name}_format": getattr(arguments, f"{name}_format") for name in _OPERATIONS[operation]
    }
    options |= {"out": arguments.out, "out_scale": arguments.out_scale}
    if operation.startswith("conv2d"):
        options |= {"stride": arguments.stride, "padding": arguments.padding}
    if operation == "conv2d-input-grad":
        if arguments.input_shape is None:
            raise ValueError("--input-shape is missing")
        options["input_shape"] = arguments.input_shape
    if operation == "conv2d-weight-grad":
        if arguments.kernel_shape is None:
            raise ValueError("--kernel-shape is missing")
        options["kernel_shape"] = arguments.kernel_shape
    chip = Chip(arguments.config, stall=arguments.stall)
    function = operation.replace("-", "_")
    result = getattr(chip, function)(*operands, **options)
    np.save(arguments.output, result)
    products = chip.counters["mac16"] + chip.counters["mac8"]
    print(
        f"{arguments.output}: {result.dtype} {result.shape}, {chip.counters['cycles']:,} cycles, "
        f"{products:,} products, "
        f"{chip.counters['skipped_zero'] + chip.counters['skipped_padding']:,} zeros skipped"
    )
    if not arguments.check:
        return 0
    expected = getattr(golden, function)(*operands, **options)
    word = np.uint16 if result.dtype == np.float16 else np.uint32
    wrong = int((np.ascontiguousarray(result).view(word) != np.ascontiguousarray(expected).view(word)).sum())
    print(f"{wrong} mismatches in {result.size:,} elements")
    return 1 if wrong else 0
