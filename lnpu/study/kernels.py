"""The fused kernels of `kernels.cpp`: what happens to a tensor when it is stored, in one pass."""

import ctypes
import hashlib
import math
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from golden.controller import COUNT_MAX, Statistics
from golden.fgmp import Policy
from golden.memory import BLOCK
from lnpu.study.names import COUNTS
from lnpu.toolchain import RTL, ToolError, check_system_tools

__all__ = ["PADDINGS", "Stored", "channel_sums", "momentum_update", "store"]

PADDINGS = (2, 4, 8, 16, 32)
"""Multiples of bytes to which blocks can be padded, of `Stored.padded`."""

_SOURCE = Path(__file__).with_name("kernels.cpp")
_BUILD = RTL.parent / "build" / "study"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_BELOW = {"fp16": 0, "fp8": 1, "zero": 2}
_F16_INFINITE = 0x7C00
_LEAST_CHANNELS = 4  # to which a pixel is padded


class _Source(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y", "mask", "a", "b", "c")] + [
        ("form", ctypes.c_int32),
        ("rectify", ctypes.c_int32),
    ]


class _Policy(ctypes.Structure):
    _fields_ = [
        ("quantise", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("lo", ctypes.c_int32),
        ("hi", ctypes.c_int32),
        ("below", ctypes.c_int32),
        ("above", ctypes.c_int32),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("segments", "segment", "run", "channels")]


class _Result(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in COUNTS],
        ("padded", ctypes.c_int64 * len(PADDINGS)),
        ("top", ctypes.c_int32),
        ("nonfinite", ctypes.c_int32),
    ]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The kernels, compiled for this processor if they are not yet.

    Raises
    ------
    ToolError
        If there is no compiler, or it fails.
    """
    source = _SOURCE.read_bytes()
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():  # the build folder may be shared by machines that differ
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    key = hashlib.sha256(source + repr((_FLAGS, cpu)).encode()).hexdigest()[:16]
    path = _BUILD / f"kernels-{key}.so"
    if not path.exists():
        check_system_tools()
        _BUILD.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        command = ["g++", *_FLAGS, "-shared", "-fPIC", "-o", str(part), str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ToolError(f"g++ cannot compile {_SOURCE}:\n{done.stderr}")
        part.replace(path)
    library = ctypes.CDLL(str(path))
    pointer = ctypes.c_void_p
    library.lnpu_store.argtypes = [pointer] * 6
    library.lnpu_sums.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int64, pointer]
    library.lnpu_sgd.argtypes = [pointer, pointer, pointer, ctypes.c_int64, *[ctypes.c_float] * 4]
    for function in (library.lnpu_store, library.lnpu_sums, library.lnpu_sgd):
        function.restype = None
    return library


@lru_cache(maxsize=4096)
def _policy(policy: Policy | None) -> _Policy:
    if policy is None:
        return _Policy(0, 0, 0, 0, 0, 0)
    return _Policy(
        1, policy.scale, _pattern(policy.lo_bits), _pattern(policy.hi_bits), _BELOW[policy.below], _BELOW[policy.above]
    )


def _pattern(bits: int) -> int:
    """FP32 pattern of an FP16 magnitude pattern; one for all that are not finite."""
    magnitude = np.uint16(min(bits, _F16_INFINITE)).view(np.float16)
    return int(np.float32(magnitude).view(np.uint32))


@lru_cache(maxsize=4096)
def _shape(shape: tuple[int, ...]) -> _Shape:
    """How a tensor [..., pixels, channels] is cut into blocks, as in `golden.memory.TensorLayout`.

    A pixel is padded to a power of two of elements, of which a block has several, or cut into blocks of 64.
    """
    *rest, pixels, channels = shape
    lines = math.prod(rest)
    if channels > BLOCK:
        return _Shape(lines * pixels, channels, BLOCK, channels)
    padded = max(_LEAST_CHANNELS, 1 << (channels - 1).bit_length())
    return _Shape(lines, pixels * channels, BLOCK // padded * channels, channels)


@dataclass(frozen=True)
class Stored:
    """What a tensor became.

    Attributes
    ----------
    zero, underflow, fp8, fp16 : int
        Elements; without quantisation only `zero`.
    top : int
        Greatest FP16 exponent field of a finite element before FGMP.
    nonfinite : bool
        An element was infinite or NaN.
    blocks, masked, mixed : int
        Blocks of 64 elements, those with a mask of non-zeros, those with precision bits.
    payload, precision : int
        Bytes of elements and of precision bits. All bytes but padding are blocks + 8 masked + precision + payload.
    padded : tuple of int
        Bytes if every block is padded to a multiple of `PADDINGS`.
    """

    zero: int
    underflow: int
    fp8: int
    fp16: int
    blocks: int
    masked: int
    mixed: int
    payload: int
    precision: int
    top: int
    nonfinite: bool
    padded: tuple[int, ...]

    def statistics(self) -> Statistics:
        """What the controller takes."""
        counts = {name: min(getattr(self, name), COUNT_MAX) for name in ("zero", "underflow", "fp8", "fp16")}
        return Statistics(**counts, top=self.top, nonfinite=self.nonfinite)


def _address(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.float64)
    return tensor.data_ptr()


FORMS = {"copy": 0, "affine": 1, "norm_gradient": 2, "sum": 3}


def store(
    x: torch.Tensor,
    policy: Policy | None,
    *,
    out: torch.Tensor | None = None,
    form: str = "copy",
    y: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    rectify: bool = False,
    vectors: tuple[torch.Tensor, ...] = (),
    sums: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stored]:
    """A pointwise formula, its result quantised, and the statistics.

    Parameters
    ----------
    x : float32 tensor [..., pixels, channels], contiguous
    policy : Policy or None
        None: plain FP32.
    out : tensor or None
        Where to (x itself is possible); None: a new tensor.
    form : {"copy", "affine", "norm_gradient", "sum"}
        x; a x + b, plus y if it is given; a x + (b y + c); x + y. Then max(., 0) if `rectify`, then 0 where
        `mask` is not positive.
    vectors : tuple of float32 tensors [channels]
        a, b and c.
    sums : float64 tensor [2, channels] or None
        Gets the sums of the values rounded to FP16 before FGMP, and of their squares.

    Returns
    -------
    values : float32 tensor
        What is read back.
    stored : Stored
    """
    out = torch.empty_like(x) if out is None else out
    a, b, c = (*vectors, None, None, None)[:3]
    source = _Source(*(_address(one) for one in (x, y, mask, a, b, c)), FORMS[form], rectify)
    result = _Result()
    _library().lnpu_store(
        ctypes.addressof(source),
        _address(out),
        ctypes.addressof(_shape(tuple(x.shape))),
        ctypes.addressof(_policy(policy)),
        ctypes.addressof(result),
        _address(sums),
    )
    counts = {name: getattr(result, name) for name in COUNTS}
    stored = Stored(**counts, top=result.top, nonfinite=bool(result.nonfinite), padded=tuple(result.padded))
    return out, stored


def channel_sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sums of x and of x y over all but the channels: float64 [2, channels] of float32 tensors [..., channels]."""
    sums = torch.empty(2, x.shape[-1], dtype=torch.float64)
    _library().lnpu_sums(_address(x), _address(y), x.numel(), x.shape[-1], _address(sums))
    return sums


def momentum_update(
    w: torch.Tensor,
    m: torch.Tensor,
    g: torch.Tensor,
    *,
    rate: float,
    momentum: float,
    decay: float,
    inv_loss_scale: float,
) -> None:
    """SGD with momentum in place, as `golden.vector.sgd_step`: every step one FP32 operation."""
    _library().lnpu_sgd(_address(w), _address(m), _address(g), w.numel(), inv_loss_scale, decay, momentum, rate)
