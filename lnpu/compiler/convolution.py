"""Convolutions on the cores, in their three phases."""

from collections.abc import Callable

from lnpu.compiler.direct import DirectLowering
from lnpu.compiler.geometry import Axis, Convolution, backward_axes, forward_axes
from lnpu.compiler.program import Program
from lnpu.compiler.rounding import Epilogue, Rounding
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.weight_grad import WeightGradLowering

__all__ = ["Convolution", "Rounding", "lower_forward", "lower_input_grad", "lower_weight_grad", "masks_outputs"]


def masks_outputs(program: Program, shape: Convolution, out: Tensor) -> bool:
    """Whether the cores can mask the outputs of BP, so that DRAIN writes those that are masked as -0.

    Not where a line of PEs has only a part of a channel block (each part would load the mask's whole blocks), nor where
    some pixels get no products at all, as under a 1x1 kernel of stride 2.
    """
    axes = _input_grad_axes(shape)
    return program.config.lanes >= out.block_channels and all(axis.taps for some in axes for axis in some)


def _input_grad_axes(shape: Convolution) -> tuple[list[Axis], list[Axis]]:
    s, p = shape.stride, shape.padding
    return (
        backward_axes(shape.height, shape.out_height, shape.kernel_height, s, p),
        backward_axes(shape.width, shape.out_width, shape.kernel_width, s, p),
    )


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
    most_planes: int | None = None,
) -> None:
    """FF: out = x * w. `vmem` to `vmem_end` are the rows of the vector memory that it may use.

    Parameters
    ----------
    reserve : int
        Tiles' worth of vector memory that `epilogue` needs for itself, at the end of the range.
    after_block : callable
        Called with a channel block when all its tiles have been stored.
    most_planes : int or None
        Most channel blocks whose tiles may come in turn; of a single block they come in order. None: any number.
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
        most_planes=most_planes,
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
    mask: Tensor | None = None,
    most_planes: int | None = None,
) -> None:
    """BP: out = dx, the error of the input. Arguments as in `lower_forward`.

    Parameters
    ----------
    mask : Tensor or None
        Of the shape of `out`: outputs where it is not positive are not computed, and reach `epilogue` as -0, which is
        nothing else's value. Only where `masks_outputs`.
    """
    _check_terms(program, f"{out.name} (back-propagation)", shape.outputs * shape.kernel_height * shape.kernel_width)
    axes_h, axes_w = _input_grad_axes(shape)
    DirectLowering(
        program,
        shape.kernel_width,
        dy,
        w,
        out,
        axes_h,
        axes_w,
        rounding,
        backward=True,
        vmem=vmem,
        vmem_end=vmem_end,
        reserve=reserve,
        mask=mask,
        most_planes=most_planes,
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
