"""Convolutions on the cores, in their three phases."""

from collections.abc import Callable

from lnpu.compiler.direct import DirectLowering
from lnpu.compiler.geometry import Convolution, backward_axes, forward_axes
from lnpu.compiler.program import Program
from lnpu.compiler.rounding import Epilogue, Rounding
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.weight_grad import WeightGradLowering

__all__ = ["Convolution", "Rounding", "lower_forward", "lower_input_grad", "lower_weight_grad"]


def _check_terms(program: Program, name: str, terms: int) -> None:
    if terms > program.config.max_terms:
        raise ValueError(
            f"{name} must sum up at most {program.config.max_terms} products, the most that acc_bits = "
            f"{program.config.acc_bits} hold whatever they are, not {terms}"
        )


def lower_forward(
    program: Program,
    shape: Convolution,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    rounding: Rounding,
    epilogue: Epilogue,
    *,
    vmem: int,
    vmem_end: int,
    reserve: int = 0,
    after_block: Callable[[int], None] | None = None,
) -> None:
    """FF: out = x * w. `vmem` to `vmem_end` are the rows of the vector memory that it may use.

    Parameters
    ----------
    reserve : int
        Tiles' worth of vector memory that `epilogue` needs for itself, at the end of the range.
    after_block : callable
        Called with a channel block when all its tiles have been stored.
    """
    k, s, p = (shape.kernel_height, shape.kernel_width), shape.stride, shape.padding
    _check_terms(program, f"{out.name} (feed-forward)", shape.channels * k[0] * k[1])
    DirectLowering(
        program,
        shape.kernel_width,
        x,
        w,
        out,
        forward_axes(shape.height, shape.out_height, k[0], s, p),
        forward_axes(shape.width, shape.out_width, k[1], s, p),
        rounding,
        backward=False,
        vmem=vmem,
        vmem_end=vmem_end,
        reserve=reserve,
    ).lower(epilogue, after_block)


def lower_input_grad(
    program: Program,
    shape: Convolution,
    dy: Tensor,
    w: Tensor,
    out: Tensor,
    rounding: Rounding,
    epilogue: Epilogue,
    *,
    vmem: int,
    vmem_end: int,
    reserve: int = 0,
    after_block: Callable[[int], None] | None = None,
) -> None:
    """BP: out = dx, the error of the input. Arguments as in `lower_forward`."""
    k, s, p = (shape.kernel_height, shape.kernel_width), shape.stride, shape.padding
    _check_terms(program, f"{out.name} (back-propagation)", shape.outputs * k[0] * k[1])
    DirectLowering(
        program,
        shape.kernel_width,
        dy,
        w,
        out,
        backward_axes(shape.height, shape.out_height, k[0], s, p),
        backward_axes(shape.width, shape.out_width, k[1], s, p),
        rounding,
        backward=True,
        vmem=vmem,
        vmem_end=vmem_end,
        reserve=reserve,
    ).lower(epilogue, after_block)


def lower_weight_grad(
    program: Program,
    shape: Convolution,
    x: Tensor,
    dy: Tensor,
    out: Tensor,
    rounding: Rounding,
    epilogue: Epilogue,
    *,
    vmem: int,
    vmem_end: int,
    reserve: int = 0,
) -> None:
    """WG: out = dw [taps, channels, outputs]. Arguments as in `lower_forward`; tiles are of `out`."""
    _check_terms(program, f"{out.name} (weight gradient)", shape.batch * shape.out_height * shape.out_width)
    WeightGradLowering(program, shape, x, dy, out, rounding, vmem=vmem, vmem_end=vmem_end, reserve=reserve).lower(
        epilogue
    )
