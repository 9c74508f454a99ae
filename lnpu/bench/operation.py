"""A case on the chip: its operands, the run, the comparison with the golden model."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import golden
from lnpu.bench.cases import Case
from lnpu.bench.rewrite import RewritingDevice
from lnpu.sim.chip import Chip

__all__ = ["Result", "operation", "run_case"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a case.

    Parameters
    ----------
    case : Case
    counters : dict of str to int
        The chip's performance counters.
    elements, mismatches : int
        Elements of the result, and how many of them were not the golden model's in every bit.
    seconds : float
        Time of the simulation.
    """

    case: Case
    counters: dict[str, int]
    elements: int
    mismatches: int
    seconds: float


def operation(case: Case) -> tuple[str, list[NDArray[np.float16]], dict[str, Any]]:
    """Function (of `Chip` and of `golden`), operands and options of a case.

    Without sparsity no operand has a zero, nor gets one by its encoding: magnitudes are 0.25 to 1.
    """
    rng = np.random.default_rng(case.seed)

    def operand(shape: tuple[int, ...], sparsity: float = 0.0) -> NDArray[np.float16]:
        values = rng.uniform(0.25, 1.0, shape) * rng.choice((-1.0, 1.0), shape)
        if case.zeros == "random" or not sparsity:
            chosen = rng.random(shape)
        else:
            chosen = _places(case.zeros, rng, shape[0], shape[2])
        return np.where(chosen < sparsity, 0.0, values).astype(np.float16)

    shape = case.shape
    options: dict[str, Any] = {} if shape.linear else {"stride": shape.stride, "padding": shape.padding}
    if case.phase == "wg":
        names, operands = ("x", "dy"), [operand(shape.x, case.sparsity), operand(shape.dy)]
        function = "weight_grad"
        if not shape.linear:
            options["kernel_shape"] = (shape.kernel, shape.kernel)
    elif case.phase == "bp":
        names, operands = ("dy", "w"), [operand(shape.dy, case.sparsity), operand(shape.w)]
        function = "input_grad"
        if not shape.linear:
            options["input_shape"] = shape.x
        if case.mask:
            options["mask"] = abs(operand(shape.x, 0.5 if case.mask == "random" else 0.0))
            if case.mask == "lines":
                options["mask"][:, :, 1::2] = 0
    else:
        names, operands, function = ("x", "w"), [operand(shape.x, case.sparsity), operand(shape.w)], ""
    options |= {f"{name}_format": format_ for name, format_ in zip(names, (case.streamed, case.resident), strict=True)}
    if shape.linear:
        operands = [one[:, :, 0, 0] for one in operands]
    kind = "linear" if shape.linear else "conv2d"
    return f"{kind}_{function}" if function else kind, operands, options


def _places(zeros: str, rng: np.random.Generator, images: int, lines: int) -> NDArray[np.float64]:
    """Numbers from 0 to below 1, evenly spread, one for each image or pair of its lines, in four dimensions."""
    pairs = -(-lines // 2)
    if zeros == "images":
        chosen = np.arange(images).repeat(pairs) % 2 / 2
    elif zeros == "bands":
        chosen = np.arange(images * pairs) % 2 / 2
    else:
        chosen = rng.permutation(images * pairs) / (images * pairs)
    return chosen.reshape(images, 1, pairs, 1).repeat(2, axis=2)[:, :, :lines]


def run_case(chip: Chip, case: Case) -> Result:
    """Run a case from reset, so that its cycles do not depend on what ran before."""
    function, operands, options = operation(case)
    chip.device.reset()  # type: ignore[attr-defined]
    if case.program != "compiled":
        chip = Chip(chip.config, device=RewritingDevice(chip.device, chip.config, case.program))
    started = time.perf_counter()
    result = getattr(chip, function)(*operands, **options)
    seconds = time.perf_counter() - started
    expected = getattr(golden, function)(*operands, **options)
    wrong = result.view(np.uint16) != expected.view(np.uint16)
    return Result(
        case=case,
        counters=dict(chip.counters),
        elements=result.size,
        mismatches=int(wrong.sum()),
        seconds=round(seconds, 2),
    )
