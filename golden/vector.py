"""FP32 arithmetic outside the cores: the vector unit's operations, and the training formulas built from them.

Every step is one IEEE FP32 operation, rounded to nearest even, subnormals included; the order of the steps is stated
with each formula. Sums over many elements are exact and rounded once. NaNs made here are 0x7FC00000.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from golden.exact import ExactSum, exact_dot_sum, round_sum
from golden.fgmp import Quantised, to_fp16
from golden.formats import FP16, canonical_fp32, encode_scalar

__all__ = [
    "BatchNormGradients",
    "BatchNormStatistics",
    "add",
    "batch_norm_apply",
    "batch_norm_backward",
    "batch_norm_coefficients",
    "batch_norm_statistics",
    "copy",
    "div",
    "global_average_pool",
    "global_average_pool_backward",
    "greater_equal",
    "keep_equal",
    "keep_positive",
    "loss_and_gradient",
    "max_pool",
    "max_pool_backward",
    "maximum",
    "minimum",
    "mul",
    "muladd",
    "relu",
    "relu_backward",
    "running_statistics",
    "sgd_step",
    "sqrt",
    "sub",
    "sum_products",
    "vector_op",
]

F32 = NDArray[np.float32]

_ZERO, _ONE = np.float32(0), np.float32(1)
_F16_ONE = np.array(encode_scalar(FP16, 1.0), np.uint16)


def _f32(name: str, x: ArrayLike) -> F32:
    """`x` as a float32 array; Python numbers are rounded to FP32."""
    array = np.asarray(x)
    if array.dtype == np.float32:
        return array
    if array.ndim == 0 and array.dtype in (np.float64, np.int64) and not isinstance(x, (np.ndarray, np.generic)):
        return array.astype(np.float32)
    raise TypeError(f"{name} must be float32, not {array.dtype!r}")


# Operations (`VectorOp`)


def copy(a: ArrayLike) -> F32:
    """a, bit for bit."""
    return _f32("a", a).copy()


def add(a: ArrayLike, b: ArrayLike) -> F32:
    """a + b."""
    with np.errstate(all="ignore"):
        return canonical_fp32(_f32("a", a) + _f32("b", b))


def sub(a: ArrayLike, b: ArrayLike) -> F32:
    """a - b."""
    with np.errstate(all="ignore"):
        return canonical_fp32(_f32("a", a) - _f32("b", b))


def mul(a: ArrayLike, b: ArrayLike) -> F32:
    """a * b."""
    with np.errstate(all="ignore"):
        return canonical_fp32(_f32("a", a) * _f32("b", b))


def muladd(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> F32:
    """(a * b) + c, two roundings."""
    return add(mul(a, b), c)


def maximum(a: ArrayLike, b: ArrayLike) -> F32:
    """a if a > b else b; NaN if either is."""
    a, b = _f32("a", a), _f32("b", b)
    return _select_nan(a, b, np.where(a > b, a, b))


def minimum(a: ArrayLike, b: ArrayLike) -> F32:
    """a if a < b else b; NaN if either is."""
    a, b = _f32("a", a), _f32("b", b)
    return _select_nan(a, b, np.where(a < b, a, b))


def _select_nan(a: F32, b: F32, selected: F32) -> F32:
    return canonical_fp32(np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), selected))


def keep_positive(a: ArrayLike, b: ArrayLike) -> F32:
    """a (bit for bit) if b > 0 else +0."""
    return np.where(_f32("b", b) > 0, _f32("a", a), _ZERO)


def keep_equal(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> F32:
    """a (bit for bit) if b == c else +0."""
    return np.where(_f32("b", b) == _f32("c", c), _f32("a", a), _ZERO)


def greater_equal(a: ArrayLike, b: ArrayLike) -> F32:
    """1.0 if a >= b else +0."""
    return np.where(_f32("a", a) >= _f32("b", b), _ONE, _ZERO)


def div(a: ArrayLike, b: ArrayLike) -> F32:
    """a / b."""
    with np.errstate(all="ignore"):
        return canonical_fp32(_f32("a", a) / _f32("b", b))


def sqrt(a: ArrayLike) -> F32:
    """Square root of a; NaN below zero (that of -0 is -0)."""
    with np.errstate(all="ignore"):
        return canonical_fp32(np.sqrt(_f32("a", a)))


def sum_products(
    a: ArrayLike,
    b: ArrayLike = 1.0,
    *,
    a_shift: int = 0,
    b_shift: int = 0,
    axis: "int | tuple[int, ...] | None" = None,
    skip_zeros: bool = True,
) -> ExactSum:
    """Exact sum of f16(a * 2^-a_shift) * f16(b * 2^-b_shift) (the operation SUM).

    SUM_OUT is `round_sum(sums, a_shift + b_shift, "fp32")`.

    Parameters
    ----------
    a, b : float32 array
        Of shapes that broadcast.
    a_shift, b_shift : int
        From -128 to 127.
    axis : int, tuple of int or None
        Axes to sum over; all if None.
    skip_zeros : bool
        Zeros of a (after its rounding) contribute nothing even against infinity and NaN, as in the chip.
    """
    a_bits, b_bits = to_fp16(_f32("a", a), a_shift), to_fp16(_f32("b", b), b_shift)
    return exact_dot_sum(a_bits, b_bits, axis, skip_zeros=skip_zeros)


_OPERATIONS: dict[str, tuple[Any, int]] = {
    "COPY": (copy, 1),
    "ADD": (add, 2),
    "SUB": (sub, 2),
    "MUL": (mul, 2),
    "MULADD": (muladd, 3),
    "MAX": (maximum, 2),
    "MIN": (minimum, 2),
    "KEEP_POSITIVE": (keep_positive, 2),
    "KEEP_EQUAL": (keep_equal, 3),
    "DIV": (div, 2),
    "SQRT": (sqrt, 1),
    "GREATER_EQUAL": (greater_equal, 2),
}


def rectified(x: ArrayLike) -> F32:
    """+0 for what is below zero and for -0; NaNs bit for bit (the flag `rectify` of a command)."""
    x = _f32("x", x)
    return np.where(np.signbit(x) & ~np.isnan(x), _ZERO, x)


def vector_op(
    name: str, a: ArrayLike, b: ArrayLike = 0.0, c: ArrayLike = 0.0, *, rectify: bool = False, masked: bool = False
) -> F32:
    """The elementwise operation of that name in the command set, on float32 arrays that broadcast.

    Parameters
    ----------
    rectify : bool
        Whether the result is `rectified`.
    masked : bool
        Whether it becomes +0 where c is not positive.

    Raises
    ------
    ValueError
        If there is no such operation.
    TypeError
        If an operand is not float32.
    """
    if name not in _OPERATIONS:
        raise ValueError(f"name must be one of {', '.join(_OPERATIONS)}, not {name!r}")
    function, operands = _OPERATIONS[name]
    result = function(*(a, b, c)[:operands])
    result = rectified(result) if rectify else result
    return keep_positive(result, c) if masked else result


# Batch normalisation over the axes 0, 2, 3 of NCHW, or 0 of NC


def _axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2:
        raise ValueError(f"a tensor must have a batch and a channel dimension, not shape {shape!r}")
    return (0, *range(2, len(shape)))


def _channels(vector: ArrayLike, shape: tuple[int, ...], name: str) -> F32:
    """A value a channel, shaped to broadcast against a tensor."""
    vector = _f32(name, vector)
    if vector.shape != (shape[1],):
        raise ValueError(f"{name} must have shape ({shape[1]},), a value a channel, not {vector.shape!r}")
    return vector.reshape(1, -1, *[1] * (len(shape) - 2))


def _quantised(name: str, x: Any) -> Quantised:
    if not isinstance(x, Quantised):
        raise TypeError(f"{name} must be Quantised, not {type(x)!r}")
    return x


def _sum(x: Quantised, y: "Quantised | None" = None) -> F32:
    """RNE32 of the exact sum over a channel of x, or of x * y."""
    other, scale = (_F16_ONE, 0) if y is None else (y.bits, y.scale)
    sums = exact_dot_sum(x.bits, other, _axes(x.shape))
    return round_sum(sums, x.scale + scale, "fp32")


@dataclass(frozen=True, eq=False)
class BatchNormStatistics:
    """What batch normalisation knows of each channel (float32 arrays [C]).

    Attributes
    ----------
    count : int
        Elements of a channel, n.
    inv_count : float32
        1 / n, rounded.
    mean, var : float32 array
        Mean and biased variance.
    invstd : float32 array
        1 / sqrt(var + eps).
    a, b : float32 array
        Coefficients of the output, a y + b.
    """

    count: int
    inv_count: np.float32
    mean: F32
    var: F32
    invstd: F32
    a: F32
    b: F32


def batch_norm_coefficients(
    mean: ArrayLike, var: ArrayLike, gamma: ArrayLike, beta: ArrayLike, eps: float = 1e-5
) -> tuple[F32, F32, F32]:
    """invstd, a and b from a mean and a variance (for inference: the running ones).

    Steps: t = var + eps; std = sqrt(t); invstd = 1 / std; a = gamma * invstd; ma = mean * a; b = beta - ma.
    """
    invstd = div(_ONE, sqrt(add(var, np.float32(eps))))
    a = mul(gamma, invstd)
    return invstd, a, sub(beta, mul(mean, a))


def batch_norm_statistics(y: Quantised, gamma: ArrayLike, beta: ArrayLike, eps: float = 1e-5) -> BatchNormStatistics:
    """Statistics of a batch and the coefficients of its normalisation.

    Steps: S1 = RNE32(sum y) and S2 = RNE32(sum y y), both exact sums; inv_n = 1 / f32(n); mean = S1 * inv_n;
    ex2 = S2 * inv_n; mm = mean * mean; var = MAX(ex2 - mm, 0); then as of `batch_norm_coefficients`.

    Parameters
    ----------
    y : Quantised
        Output of the convolution [N, C, ...] before its FGMP (`fgmp(y, Policy(scale))`).
    gamma, beta : float32 array [C]
    eps : float
        Rounded to FP32.

    Raises
    ------
    TypeError
        If y is not Quantised, or a vector not float32.
    ValueError
        If a shape does not agree.
    """
    y = _quantised("y", y)
    axes = _axes(y.shape)
    _channels(gamma, y.shape, "gamma"), _channels(beta, y.shape, "beta")
    count = int(np.prod([y.shape[axis] for axis in axes], dtype=np.int64))
    if count == 0:
        raise ValueError(f"y must have elements, not shape {y.shape!r}")
    inv_count = np.float32(div(_ONE, np.float32(count)))
    mean, ex2 = mul(_sum(y), inv_count), mul(_sum(y, y), inv_count)
    var = maximum(sub(ex2, mul(mean, mean)), _ZERO)
    invstd, a, b = batch_norm_coefficients(mean, var, gamma, beta, eps)
    return BatchNormStatistics(count, inv_count, mean, var, invstd, a, b)


def batch_norm_apply(
    y: "Quantised | ArrayLike",
    a: ArrayLike,
    b: ArrayLike,
    *,
    shortcut: "ArrayLike | None" = None,
    rectify: bool = False,
) -> F32:
    """z = (a * y) + b; z = z + shortcut, if there is one; z = MAX(z, 0), if `rectify`.

    Parameters
    ----------
    y : Quantised or float32 array [N, C, ...]
    a, b : float32 array [C]
    shortcut : float32 array or None
        Of the shape of y.
    """
    y = y.values() if isinstance(y, Quantised) else _f32("y", y)
    z = muladd(_channels(a, y.shape, "a"), y, _channels(b, y.shape, "b"))
    if shortcut is not None:
        shortcut = _f32("shortcut", shortcut)
        if shortcut.shape != y.shape:
            raise ValueError(f"shortcut must have shape {y.shape}, that of y, not {shortcut.shape!r}")
        z = add(z, shortcut)
    return relu(z) if rectify else z


def running_statistics(
    running_mean: ArrayLike, running_var: ArrayLike, statistics: BatchNormStatistics, momentum: float = 0.1
) -> tuple[F32, F32]:
    """Running mean and variance after a batch.

    Steps: u = var * f32(n / (n - 1)) (factor 1 if n = 1), the variance from here on; for each of the two,
    running = (running * f32(1 - momentum)) + (statistic * f32(momentum)).
    """
    count = statistics.count
    unbiased = mul(statistics.var, np.float32(count / (count - 1) if count > 1 else 1.0))
    keep, take = np.float32(1 - momentum), np.float32(momentum)
    mean = add(mul(running_mean, keep), mul(statistics.mean, take))
    return mean, add(mul(running_var, keep), mul(unbiased, take))


@dataclass(frozen=True, eq=False)
class BatchNormGradients:
    """Gradients of batch normalisation: `dy` [N, C, ...], `dgamma` and `dbeta` [C], and the coefficients of
    dy = (a * dz) + ((b * y) + c) (float32)."""

    dy: F32
    dgamma: F32
    dbeta: F32
    a: F32
    b: F32
    c: F32


def batch_norm_backward(dz: Quantised, y: Quantised, statistics: BatchNormStatistics) -> BatchNormGradients:
    """Gradients of batch normalisation in training.

    Steps: S1 = RNE32(sum dz) and S2 = RNE32(sum dz y), both exact sums; ms = mean * S1; d = S2 - ms;
    dgamma = d * invstd; dbeta = S1; A = a; g1 = dgamma * inv_n; g2 = S1 * inv_n; p = A * invstd; B = 0 - (p * g1);
    r = A * g2; s = B * mean; C = 0 - (r + s); dy = (A * dz) + ((B * y) + C).

    Parameters
    ----------
    dz : Quantised
        Gradient of the output, [N, C, ...].
    y : Quantised
        Input of the normalisation, as of `batch_norm_statistics`.
    statistics : BatchNormStatistics
        Of the forward pass.

    Raises
    ------
    TypeError
        If dz or y is not Quantised.
    ValueError
        If their shapes differ.
    """
    dz, y = _quantised("dz", dz), _quantised("y", y)
    if dz.shape != y.shape:
        raise ValueError(f"dz must have shape {y.shape}, that of y, not {dz.shape!r}")
    known = statistics
    s1, s2 = _sum(dz), _sum(dz, y)
    dgamma = mul(sub(s2, mul(known.mean, s1)), known.invstd)
    g1, g2 = mul(dgamma, known.inv_count), mul(s1, known.inv_count)
    b = sub(_ZERO, mul(mul(known.a, known.invstd), g1))
    c = sub(_ZERO, add(mul(known.a, g2), mul(b, known.mean)))
    at = {name: _channels(value, y.shape, name) for name, value in (("a", known.a), ("b", b), ("c", c))}
    dy = muladd(at["a"], dz.values(), muladd(at["b"], y.values(), at["c"]))
    return BatchNormGradients(dy, dgamma, s1, known.a, b, c)


# Rectifier and pooling


def relu(x: ArrayLike) -> F32:
    """MAX(x, 0): +0 for what is not positive."""
    return maximum(x, _ZERO)


def relu_backward(e: ArrayLike, x: ArrayLike) -> F32:
    """KEEP_POSITIVE(e, x): the gradient e where the rectifier's output (or input) x is positive."""
    return keep_positive(e, x)


def _window_counts(shape: tuple[int, ...], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    for name, value, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    if padding > kernel // 2:
        raise ValueError(f"padding must be at most half the kernel, {kernel // 2}, not {padding!r}")
    if len(shape) != 4:
        raise ValueError(f"x must have 4 dimensions, not shape {shape!r}")
    counts = tuple((size + 2 * padding - kernel) // stride + 1 for size in shape[2:])
    if min(counts) < 1:
        raise ValueError(f"kernel must be at most the padded image, not {kernel!r}")
    return counts[0], counts[1]


def _tap(array: NDArray, tap: int, kernel: int, stride: int, out: tuple[int, int]) -> NDArray:
    """View of the pixels of a padded image under tap number `tap` of all windows."""
    r, s = divmod(tap, kernel)
    return array[:, :, r : r + (out[0] - 1) * stride + 1 : stride, s : s + (out[1] - 1) * stride + 1 : stride]


def max_pool(x: ArrayLike, kernel: int, stride: int, padding: int = 0) -> tuple[F32, NDArray[np.int64]]:
    """Greatest value of each window.

    Steps: m = the first tap; for each further tap t in row-major order, m = MAX(t, m), so that the first of equal
    maxima stays. Beyond the image is -infinity. A window with a NaN gives NaN, its first.

    Parameters
    ----------
    x : float32 array [N, C, H, W]
    kernel, stride, padding : int
        The same in both directions; padding at most half the kernel.

    Returns
    -------
    values : float32 array [N, C, Ho, Wo]
    argmax : int64 array
        Which tap r * kernel + s won.

    Raises
    ------
    TypeError, ValueError
        If x is not float32 with 4 dimensions, or a number is out of range.
    """
    x = _f32("x", x)
    out = _window_counts(x.shape, kernel, stride, padding)
    sides = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded = np.pad(x, sides, constant_values=np.float32(-np.inf))
    values = _tap(padded, 0, kernel, stride, out).copy()
    argmax = np.zeros(values.shape, np.int64)
    for tap in range(1, kernel * kernel):
        candidate = _tap(padded, tap, kernel, stride, out)
        wins = (candidate > values) | (np.isnan(candidate) & ~np.isnan(values))
        values = np.where(wins, candidate, values)
        argmax[wins] = tap
    return canonical_fp32(values), argmax


def max_pool_backward(
    dy: ArrayLike, argmax: NDArray[np.int64], input_shape: tuple[int, ...], kernel: int, stride: int, padding: int = 0
) -> F32:
    """Gradient of `max_pool` for its input.

    Steps: dx = 0; for each tap (r, s) of the window in row-major order, dx = dx + dy (FP32) at the pixel under the tap,
    for the windows that the tap won.

    Parameters
    ----------
    dy : float32 array [N, C, Ho, Wo]
    argmax : int64 array
        Of the forward pass.
    input_shape : (int, int, int, int)

    Raises
    ------
    TypeError, ValueError
        If dy is not float32, or a shape does not agree.
    """
    dy = _f32("dy", dy)
    n, c, h, w = input_shape
    out = _window_counts(tuple(input_shape), kernel, stride, padding)
    if dy.shape != (n, c, *out) or argmax.shape != dy.shape:
        raise ValueError(f"dy and argmax must have shape {(n, c, *out)}, not {(dy.shape, argmax.shape)!r}")
    padded = np.zeros((n, c, h + 2 * padding, w + 2 * padding), np.float32)
    for tap in range(kernel * kernel):
        view = _tap(padded, tap, kernel, stride, out)
        view[...] = add(view, np.where(argmax == tap, dy, _ZERO))
    return padded[:, :, padding : padding + h, padding : padding + w].copy()


def global_average_pool(x: Quantised) -> F32:
    """Mean of each channel [N, C] of x [N, C, H, W]: RNE32(exact sum) * f32(1 / f32(H W)).

    Raises
    ------
    TypeError, ValueError
        If x is not Quantised with 4 dimensions.
    """
    x = _quantised("x", x)
    if len(x.shape) != 4:
        raise ValueError(f"x must have 4 dimensions, not shape {x.shape!r}")
    sums = exact_dot_sum(x.bits, _F16_ONE, (2, 3))
    return mul(round_sum(sums, x.scale, "fp32"), div(_ONE, np.float32(x.shape[2] * x.shape[3])))


def global_average_pool_backward(dp: ArrayLike, input_shape: tuple[int, ...]) -> F32:
    """Gradient [N, C, H, W] of `global_average_pool`: dp [N, C] * f32(1 / f32(H W)) at every pixel."""
    dp = _f32("dp", dp)
    if len(input_shape) != 4 or dp.shape != tuple(input_shape[:2]):
        raise ValueError(f"dp must have shape {tuple(input_shape[:2])}, not {dp.shape!r}")
    scaled = mul(dp, div(_ONE, np.float32(input_shape[2] * input_shape[3])))
    return np.broadcast_to(scaled[:, :, None, None], input_shape).copy()


# Update and loss


def sgd_step(
    w: ArrayLike,
    m: ArrayLike,
    g: ArrayLike,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    inv_loss_scale: float = 1.0,
) -> tuple[F32, F32]:
    """Stochastic gradient descent with momentum: new weights and new momentum.

    Steps: gs = g * inv_loss_scale; gw = weight_decay * w; d = gs + gw; m = (momentum * m) + d; w = w - (lr * m).
    The four numbers are rounded to FP32 first.

    Parameters
    ----------
    w, m, g : float32 array
        Weights, momentum and gradient, of one shape.

    Raises
    ------
    TypeError, ValueError
        If an array is not float32, or the shapes differ.
    """
    w, m, g = _f32("w", w), _f32("m", m), _f32("g", g)
    if not w.shape == m.shape == g.shape:
        raise ValueError(f"w, m and g must have one shape, not {(w.shape, m.shape, g.shape)!r}")
    d = add(mul(g, np.float32(inv_loss_scale)), mul(np.float32(weight_decay), w))
    m = muladd(np.float32(momentum), m, d)
    return sub(w, mul(np.float32(lr), m)), m


def loss_and_gradient(logits: ArrayLike, labels: ArrayLike) -> tuple[float, F32]:
    """Softmax cross-entropy, mean over the batch, and its gradient (on the host, in float64, rounded once to FP32).

    Parameters
    ----------
    logits : float array [N, classes]
    labels : int array [N]

    Returns
    -------
    loss : float
    dlogits : float32 array [N, classes]

    Raises
    ------
    ValueError
        If the shapes do not agree or a label is no class.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and labels must have shapes [N, classes] and [N], not {(logits.shape, labels.shape)!r}"
        )
    if labels.size and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        raise ValueError(f"labels must be 0 to {logits.shape[1] - 1}, not {(labels.min(), labels.max())!r}")
    rows = np.arange(len(labels))
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = logits - logits.max(1, keepdims=True)
        log_sum = np.log(np.exp(shifted).sum(1, keepdims=True))
        loss = float((log_sum[:, 0] - shifted[rows, labels]).mean())
        gradient = np.exp(shifted - log_sum)
    gradient[rows, labels] -= 1
    return loss, canonical_fp32((gradient / len(labels)).astype(np.float32))
