"""Fully connected layers and their gradients: exact sums of products, rounded once.

The streamed operand, whose zeros are skipped even against infinity and NaN, is x in `linear` and
`linear_weight_grad`, and dy in `linear_input_grad`.
"""

from typing import Any

from numpy.typing import ArrayLike, NDArray

from golden.conv import as_quantised, masked_output, round_output
from golden.exact import ExactSum, exact_matmul
from golden.fgmp import Policy, Quantised

__all__ = [
    "linear",
    "linear_input_grad",
    "linear_input_grad_sums",
    "linear_sums",
    "linear_weight_grad",
    "linear_weight_grad_sums",
]


def linear_sums(x: Quantised, w: Quantised) -> ExactSum:
    """Exact sums [N, O] of x [N, C] times w [O, C] transposed (of v, not of x).

    Raises
    ------
    ValueError
        If the shapes do not agree.
    """
    if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x and w must have shapes [N, C] and [O, C], not {(x.shape, w.shape)!r}")
    return exact_matmul(x.bits, w.bits.T)


def linear_input_grad_sums(dy: Quantised, w: Quantised) -> ExactSum:
    """Exact sums [N, C] of dy [N, O] times w [O, C].

    Raises
    ------
    ValueError
        If the shapes do not agree.
    """
    if len(dy.shape) != 2 or len(w.shape) != 2 or dy.shape[1] != w.shape[0]:
        raise ValueError(f"dy and w must have shapes [N, O] and [O, C], not {(dy.shape, w.shape)!r}")
    return exact_matmul(dy.bits, w.bits)


def linear_weight_grad_sums(x: Quantised, dy: Quantised) -> ExactSum:
    """Exact sums [O, C] over the batch of dy [N, O] times x [N, C] (streamed).

    Raises
    ------
    ValueError
        If the shapes do not agree.
    """
    if len(x.shape) != 2 or len(dy.shape) != 2 or x.shape[0] != dy.shape[0]:
        raise ValueError(f"x and dy must have shapes [N, C] and [N, O], not {(x.shape, dy.shape)!r}")
    return exact_matmul(x.bits.T, dy.bits).transpose()


def linear(
    x: "ArrayLike | Quantised",
    w: "ArrayLike | Quantised",
    *,
    x_format: "str | Policy" = "fp16",
    w_format: "str | Policy" = "fp16",
    out_scale: int = 0,
    out: str = "fp16",
    saturate: bool = False,
) -> NDArray[Any]:
    """x times w transposed: the exact sum of the products, times 2^-out_scale, rounded once.

    Parameters
    ----------
    x : float16 or float32 array, or Quantised
        Input [N, C]; streamed.
    w : float16 or float32 array, or Quantised
        Weights [O, C].
    x_format, w_format : str or Policy
        How arrays are encoded; ignored for operands that are encoded already.
    out_scale : int
        Scale of the output, which is returned as v = y * 2^-out_scale.
    out : {"fp16", "fp32"}
        Format of the rounding.
    saturate : bool
        An overflow gives the largest finite number instead of infinity.

    Returns
    -------
    float16 or float32 array
        Shape [N, O].

    Raises
    ------
    TypeError
        If an operand is neither float16 nor float32.
    ValueError
        If the shapes or formats are not valid.
    """
    xq, wq = as_quantised("x", x, x_format, 2), as_quantised("w", w, w_format, 2)
    return round_output(linear_sums(xq, wq), xq.scale + wq.scale - out_scale, out, saturate)


def linear_input_grad(
    dy: "ArrayLike | Quantised",
    w: "ArrayLike | Quantised",
    *,
    mask: "ArrayLike | Quantised | None" = None,
    dy_format: "str | Policy" = "fp16",
    w_format: "str | Policy" = "fp16",
    mask_format: "str | Policy" = "fp16",
    out_scale: int = 0,
    out: str = "fp16",
    saturate: bool = False,
) -> NDArray[Any]:
    """Gradient [N, C] for the input of `linear` from dy [N, O] (streamed); `mask` as of `conv2d_input_grad`, the rest
    as of `linear`."""
    dyq, wq = as_quantised("dy", dy, dy_format, 2), as_quantised("w", w, w_format, 2)
    result = round_output(linear_input_grad_sums(dyq, wq), dyq.scale + wq.scale - out_scale, out, saturate)
    return result if mask is None else masked_output(result, as_quantised("mask", mask, mask_format, 2))


def linear_weight_grad(
    x: "ArrayLike | Quantised",
    dy: "ArrayLike | Quantised",
    *,
    x_format: "str | Policy" = "fp16",
    dy_format: "str | Policy" = "fp16",
    out_scale: int = 0,
    out: str = "fp16",
    saturate: bool = False,
) -> NDArray[Any]:
    """Weight gradient [O, C] of `linear` from x [N, C] (streamed) and dy [N, O]; the rest as of `linear`."""
    xq, dyq = as_quantised("x", x, x_format, 2), as_quantised("dy", dy, dy_format, 2)
    return round_output(linear_weight_grad_sums(xq, dyq), xq.scale + dyq.scale - out_scale, out, saturate)
