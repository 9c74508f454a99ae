"""Convolutions and their gradients: exact sums of products, rounded once.

Tensors are NCHW, weights OIHW (output channels, input channels, kernel height and width), as in PyTorch. An operand is
first encoded by its policy (v = RNE16(x * 2^-scale), then FGMP); `conv2d_sums` and its like take operands that are
encoded already and return the exact sums, for a caller that chooses the rounding.

The streamed operand, whose zeros are skipped even against infinity and NaN, is x in `conv2d` and
`conv2d_weight_grad`, and dy in `conv2d_input_grad`. What lies outside an image contributes nothing.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import ArrayLike, NDArray

from golden.exact import DenseOperand, ExactSum, StreamedTensor, accumulate_product, has_special, round_sum
from golden.fgmp import Policy, Quantised, as_policy, fgmp

__all__ = [
    "as_quantised",
    "conv2d",
    "conv2d_input_grad",
    "conv2d_input_grad_sums",
    "conv2d_output_shape",
    "conv2d_sums",
    "conv2d_weight_grad",
    "conv2d_weight_grad_sums",
    "round_output",
]

_CHUNK = 1 << 19
"""Elements of the matrix of patches that are worked on at a time (float64)."""

_CHUNK_WG = 1 << 21
"""The same for weight gradients, where each chunk adds to all sums."""

_MAX_TERMS = 1 << 16
"""Terms that are added to a sum at a time."""

Pair = int | tuple[int, int]


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, (int, np.integer)) else value
    if not (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(isinstance(one, (int, np.integer)) and not isinstance(one, bool) and one >= least for one in pair)
    ):
        raise ValueError(f"{name} must be an integer of at least {least} or a pair of them, not {value!r}")
    return int(pair[0]), int(pair[1])


def as_quantised(name: str, x: "ArrayLike | Quantised", policy: "str | Policy", ndim: int) -> Quantised:
    """Operand `x` encoded by `policy`, or as it is if it is encoded already.

    Raises
    ------
    TypeError
        If it is no float16 or float32 array.
    ValueError
        If it does not have `ndim` dimensions.
    """
    if not isinstance(x, Quantised):
        x = np.asarray(x)
        if x.dtype not in (np.float16, np.float32):
            raise TypeError(f"{name} must be float16 or float32, not {x.dtype!r}")
    if len(x.shape) != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not shape {x.shape!r}")
    return x if isinstance(x, Quantised) else fgmp(x, as_policy(policy))


def round_output(sums: ExactSum, shift: int, out: str, saturate: bool) -> NDArray[Any]:
    """Sums times 2^shift rounded once: a float16 ("fp16") or float32 ("fp32") array.

    Raises
    ------
    ValueError
        If `out` is neither.
    """
    if out not in ("fp16", "fp32"):
        raise ValueError(f"out must be fp16 or fp32, not {out!r}")
    rounded = round_sum(sums, shift, out, saturate)
    return rounded.view(np.float16) if out == "fp16" else rounded


def masked_output(result: NDArray[Any], mask: Quantised) -> NDArray[Any]:
    """+0 where `mask` is not positive, and instead of -0.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if mask.shape != result.shape:
        raise ValueError(f"mask must have shape {result.shape}, that of the gradient, not {mask.shape!r}")
    return np.where((mask.values() > 0) & (result != 0), result, result.dtype.type(0))


def conv2d_output_shape(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], stride: Pair = 1, padding: Pair = 0
) -> tuple[int, int, int, int]:
    """Shape [N, O, Ho, Wo] of a convolution's output.

    Raises
    ------
    ValueError
        If the shapes do not agree, or the kernel is larger than the padded image.
    """
    (sh, sw), (ph, pw) = _pair("stride", stride, 1), _pair("padding", padding, 0)
    if len(x_shape) != 4 or len(w_shape) != 4:
        raise ValueError(f"x and w must have 4 dimensions, not shapes {(tuple(x_shape), tuple(w_shape))!r}")
    if min(x_shape) < 1 or min(w_shape) < 1:
        raise ValueError(f"dimensions must be at least 1, not {(tuple(x_shape), tuple(w_shape))!r}")
    if x_shape[1] != w_shape[1]:
        raise ValueError(f"w must have {x_shape[1]} input channels, those of x, not {w_shape[1]!r}")
    height, width = x_shape[2] + 2 * ph - w_shape[2], x_shape[3] + 2 * pw - w_shape[3]
    if height < 0 or width < 0:
        padded = (x_shape[2] + 2 * ph, x_shape[3] + 2 * pw)
        raise ValueError(f"kernel must be at most {padded}, the padded image, not {tuple(w_shape[2:])!r}")
    return x_shape[0], w_shape[0], height // sh + 1, width // sw + 1


class _Patches:
    """The patches of an NHWC tensor under a kernel, in chunks of rows [pixel, (r, s, c)].

    Parameters
    ----------
    x : StreamedTensor
        Shape [N, H, W, C].
    kernel, stride, out : (int, int)
        Kernel, stride, and output pixels of an image.
    top, left : int
        Zeros before the image's first row and column; negative where the patches start inside the image.
    """

    def __init__(
        self,
        x: StreamedTensor,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        out: tuple[int, int],
        top: int,
        left: int,
    ) -> None:
        self.x, self.kernel, self.stride, self.out, self.top, self.left = x, kernel, stride, out, top, left

    def _window(self, array: NDArray, images: slice, rows: slice) -> NDArray:
        """View [N, rows, Wo, R, S, C] of a zero-padded copy of the part of `array` that the patches need."""
        count, (_, height, width, channels) = images.stop - images.start, array.shape
        (kr, ks), (sh, sw) = self.kernel, self.stride
        first_h = rows.start * sh - self.top
        need_h, need_w = (rows.stop - rows.start - 1) * sh + kr, (self.out[1] - 1) * sw + ks
        inside_h = slice(max(first_h, 0), max(min(first_h + need_h, height), max(first_h, 0)))
        first_w = -self.left
        inside_w = slice(max(first_w, 0), max(min(first_w + need_w, width), max(first_w, 0)))
        part = array[images, inside_h, inside_w]
        if part.shape[1:3] != (need_h, need_w):
            padded = np.zeros((count, need_h, need_w, channels), array.dtype)
            at_h, at_w = inside_h.start - first_h, inside_w.start - first_w
            if part.size:
                padded[:, at_h : at_h + part.shape[1], at_w : at_w + part.shape[2]] = part
            part = padded
        n, h, w, c = part.strides
        shape = (count, rows.stop - rows.start, self.out[1], kr, ks, channels)
        return as_strided(part, shape, (n, h * sh, w * sw, h, w, c), writeable=False)

    def _matrix(self, array: NDArray, images: slice, rows: slice) -> NDArray:
        window = self._window(array, images, rows)
        return window.reshape(-1, window.shape[3] * window.shape[4] * window.shape[5])

    def chunks(
        self, with_bits: bool, size: int = _CHUNK
    ) -> Iterator[tuple[slice, slice, NDArray[np.float64], NDArray[np.uint16] | None]]:
        """Images, output rows, patches of them (as float64 and, on request, patterns).

        Chunks with part of the rows have one image.
        """
        images = self.x.values.shape[0]
        line = self.out[1] * self.kernel[0] * self.kernel[1] * self.x.values.shape[3]
        limit = max(1, min(size // max(1, line), _MAX_TERMS // max(1, self.out[1])))
        together = max(1, limit // self.out[0])
        step = min(limit, self.out[0])
        for n in range(0, images, together):
            chosen = slice(n, min(n + together, images))
            for h in range(0, self.out[0], step):
                rows = slice(h, min(h + step, self.out[0]))
                bits = self._matrix(self.x.bits, chosen, rows) if with_bits else None
                yield chosen, rows, self._matrix(self.x.values, chosen, rows), bits


def _correlate(patches: _Patches, dense_bits: NDArray[np.uint16]) -> ExactSum:
    """Sums [N, Ho, Wo, O] of the patches times a dense matrix [(r, s, c), O]."""
    dense, x = DenseOperand(dense_bits), patches.x
    out = ExactSum.zeros((x.values.shape[0], *patches.out, dense_bits.shape[1]))
    squares = np.einsum("nhwc,nhwc->nhw", x.values, x.values)[..., None]
    terms = dense_bits.shape[0]
    for images, rows, values, bits in patches.chunks(x.special or dense.special):
        window = patches._window(squares, images, rows)
        norm = float(np.sqrt(window.sum((3, 4, 5)).max(initial=0.0)))
        part = out[images, rows].reshape(-1, dense_bits.shape[1])  # contiguous: one image, or whole ones
        for start in range(0, terms, _MAX_TERMS):
            some = slice(start, start + _MAX_TERMS)
            if terms <= _MAX_TERMS:
                accumulate_product(part, values, bits, x, dense, norm)
            else:
                piece = None if bits is None else bits[:, some]
                accumulate_product(part, values[:, some], piece, x, DenseOperand(dense_bits[some]), norm)
    return out


def _nhwc(bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(bits.transpose(0, 2, 3, 1))


def conv2d_sums(x: Quantised, w: Quantised, *, stride: Pair = 1, padding: Pair = 0) -> ExactSum:
    """Exact sums [N, O, Ho, Wo] of the convolution of x [N, C, H, W] with w [O, C, R, S] (of v, not of x).

    Raises
    ------
    ValueError
        As of `conv2d_output_shape`.
    """
    (sh, sw), (ph, pw) = _pair("stride", stride, 1), _pair("padding", padding, 0)
    shape = conv2d_output_shape(x.shape, w.shape, stride, padding)
    kernel = w.shape[2], w.shape[3]
    patches = _Patches(StreamedTensor(_nhwc(x.bits)), kernel, (sh, sw), (shape[2], shape[3]), ph, pw)
    dense = w.bits.transpose(2, 3, 1, 0).reshape(-1, shape[1])
    return _correlate(patches, dense).transpose(0, 3, 1, 2)


def _check_gradient(dy: Quantised, shape: tuple[int, int, int, int]) -> None:
    if dy.shape != shape:
        raise ValueError(f"dy must have shape {shape}, that of the output, not {dy.shape!r}")


def conv2d_input_grad_sums(
    dy: Quantised, w: Quantised, *, input_shape: tuple[int, ...], stride: Pair = 1, padding: Pair = 0
) -> ExactSum:
    """Exact sums [N, C, H, W] of the gradient for x, from dy [N, O, Ho, Wo] and w [O, C, R, S] (of v).

    Raises
    ------
    ValueError
        If a shape does not agree with `input_shape`.
    """
    strides, paddings = _pair("stride", stride, 1), _pair("padding", padding, 0)
    input_shape = tuple(input_shape)
    _check_gradient(dy, conv2d_output_shape(input_shape, w.shape, stride, padding))
    n, c, h, wd = input_shape
    out = ExactSum.zeros((n, h, wd, c))
    streamed = StreamedTensor(_nhwc(dy.bits))
    flipped = w.bits.transpose(2, 3, 0, 1)  # [R, S, O, C]

    def phase(axis: int, first: int) -> tuple[int, int, int]:
        """First tap, number of taps and offset q: pixel first + stride i meets dy[i + q - t] under tap number t."""
        tap = (first + paddings[axis]) % strides[axis]
        taps = len(range(tap, w.shape[2 + axis], strides[axis]))
        return tap, taps, (first + paddings[axis] - tap) // strides[axis]

    # Pixels of one phase of the stride meet the same taps: a convolution of unit stride each.
    for first_h in range(min(strides[0], h)):
        tap_h, taps_h, q_h = phase(0, first_h)
        for first_w in range(min(strides[1], wd)):
            tap_w, taps_w, q_w = phase(1, first_w)
            if not taps_h or not taps_w:
                continue
            taps = flipped[tap_h :: strides[0], tap_w :: strides[1]][::-1, ::-1]
            pixels = len(range(first_h, h, strides[0])), len(range(first_w, wd, strides[1]))
            top, left = taps_h - 1 - q_h, taps_w - 1 - q_w
            patches = _Patches(streamed, (taps_h, taps_w), (1, 1), pixels, top, left)
            out[:, first_h :: strides[0], first_w :: strides[1]] = _correlate(patches, taps.reshape(-1, c))
    return out.transpose(0, 3, 1, 2)


def conv2d_weight_grad_sums(
    x: Quantised, dy: Quantised, *, kernel_shape: tuple[int, int], stride: Pair = 1, padding: Pair = 0
) -> ExactSum:
    """Exact sums [O, C, R, S] of the gradient for w, from x [N, C, H, W] and dy [N, O, Ho, Wo] (of v).

    Raises
    ------
    ValueError
        If the shapes do not agree.
    """
    (sh, sw), (ph, pw) = _pair("stride", stride, 1), _pair("padding", padding, 0)
    kernel = _pair("kernel_shape", kernel_shape, 1)
    c, o = x.shape[1], dy.shape[1]
    _check_gradient(dy, conv2d_output_shape(x.shape, (o, c, *kernel), stride, padding))
    patches = _Patches(StreamedTensor(_nhwc(x.bits)), kernel, (sh, sw), (dy.shape[2], dy.shape[3]), ph, pw)
    dense_bits, streamed = _nhwc(dy.bits), patches.x
    special = streamed.special or has_special(dy.bits)
    out = ExactSum.zeros((kernel[0] * kernel[1] * c, o))
    for images, rows, values, bits in patches.chunks(special, _CHUNK_WG):
        dense = DenseOperand(dense_bits[images, rows].reshape(-1, o))
        columns = float(np.sqrt(np.einsum("ij,ij->j", values, values).max(initial=0.0)))
        accumulate_product(out, values.T, None if bits is None else bits.T, streamed, dense, columns)
    return out.reshape(*kernel, c, o).transpose(3, 2, 0, 1)


def conv2d(
    x: "ArrayLike | Quantised",
    w: "ArrayLike | Quantised",
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    x_format: "str | Policy" = "fp16",
    w_format: "str | Policy" = "fp16",
    out_scale: int = 0,
    out: str = "fp16",
    saturate: bool = False,
) -> NDArray[Any]:
    """Forward convolution (cross-correlation): the exact sum of the products, times 2^-out_scale, rounded once.

    Parameters
    ----------
    x : float16 or float32 array, or Quantised
        Input [N, C, H, W]; streamed.
    w : float16 or float32 array, or Quantised
        Weights [O, C, R, S].
    stride, padding : int or (int, int)
        Vertical and horizontal; padding on both sides.
    x_format, w_format : str or Policy
        How arrays are encoded ("fp16", "fp8" or a policy); ignored for operands that are encoded already.
    out_scale : int
        Scale of the output, which is returned as v = y * 2^-out_scale.
    out : {"fp16", "fp32"}
        Format of the rounding.
    saturate : bool
        An overflow gives the largest finite number instead of infinity.

    Returns
    -------
    float16 or float32 array
        Shape [N, O, Ho, Wo].

    Raises
    ------
    TypeError
        If an operand is neither float16 nor float32.
    ValueError
        If shapes, stride, padding or formats are not valid together.
    """
    xq, wq = as_quantised("x", x, x_format, 4), as_quantised("w", w, w_format, 4)
    sums = conv2d_sums(xq, wq, stride=stride, padding=padding)
    return round_output(sums, xq.scale + wq.scale - out_scale, out, saturate)


def conv2d_input_grad(
    dy: "ArrayLike | Quantised",
    w: "ArrayLike | Quantised",
    *,
    input_shape: tuple[int, ...],
    stride: Pair = 1,
    padding: Pair = 0,
    mask: "ArrayLike | Quantised | None" = None,
    dy_format: "str | Policy" = "fp16",
    w_format: "str | Policy" = "fp16",
    mask_format: "str | Policy" = "fp16",
    out_scale: int = 0,
    out: str = "fp16",
    saturate: bool = False,
) -> NDArray[Any]:
    """Error back-propagation: gradient [N, C, H, W] for the input of `conv2d` from dy [N, O, Ho, Wo] (streamed).

    Parameters
    ----------
    input_shape : (int, int, int, int)
        Shape of x.
    mask : float16 or float32 array, Quantised or None
        Of shape `input_shape`, the output of the ReLU that x is: where it is not positive, the gradient is +0. With a
        mask no result is -0.

    Other parameters, returns and errors as of `conv2d`.
    """
    dyq, wq = as_quantised("dy", dy, dy_format, 4), as_quantised("w", w, w_format, 4)
    sums = conv2d_input_grad_sums(dyq, wq, input_shape=input_shape, stride=stride, padding=padding)
    result = round_output(sums, dyq.scale + wq.scale - out_scale, out, saturate)
    return result if mask is None else masked_output(result, as_quantised("mask", mask, mask_format, 4))


def conv2d_weight_grad(
    x: "ArrayLike | Quantised",
    dy: "ArrayLike | Quantised",
    *,
    kernel_shape: tuple[int, int],
    stride: Pair = 1,
    padding: Pair = 0,
    x_format: "str | Policy" = "fp16",
    dy_format: "str | Policy" = "fp16",
    out_scale: int = 0,
    out: str = "fp16",
    saturate: bool = False,
) -> NDArray[Any]:
    """Weight gradient [O, C, R, S] of `conv2d` from x [N, C, H, W] (streamed) and dy [N, O, Ho, Wo].

    Parameters
    ----------
    kernel_shape : (int, int)
        Height and width of the kernel.

    Other parameters, returns and errors as of `conv2d`.
    """
    xq, dyq = as_quantised("x", x, x_format, 4), as_quantised("dy", dy, dy_format, 4)
    sums = conv2d_weight_grad_sums(xq, dyq, kernel_shape=kernel_shape, stride=stride, padding=padding)
    return round_output(sums, xq.scale + dyq.scale - out_scale, out, saturate)
