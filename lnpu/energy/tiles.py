"""Operands for gates: tensors of a training step of ResNet-18 by the golden model, and tiles of them."""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

import golden.network
from golden.fgmp import CODE_FP8, CODE_PADDING, CODE_ZERO, Quantised, as_policy, fgmp
from lnpu.compiler.policies import TARGETS, get_formats
from lnpu.datasets import load_images, normalise

__all__ = ["LAYER", "Tile", "Tiles", "make_tiles"]

LAYER = "layer1.1.conv2"
"""The convolution: 3x3, 64 to 64 channels."""

_WIDTH, _IMAGE, _BATCH, _WARM_UP = 64, 8, 4, 5


@dataclass(frozen=True)
class Tile:
    """A sparse tile: patterns and codes [pixel with halo, channel]; padding around 8x8 pixels of 64 channels."""

    bits: NDArray[np.uint16]
    codes: NDArray[np.uint8]

    @property
    def shares(self) -> dict[str, float]:
        """Of the elements that are no padding."""
        real = self.codes[self.codes != CODE_PADDING]
        zero, fp8 = float((real == CODE_ZERO).mean()), float((real == CODE_FP8).mean())
        return {"zero": zero, "fp8": fp8, "fp16": 1 - zero - fp8}


@dataclass(frozen=True)
class Tiles:
    """Operands of one convolution.

    Attributes
    ----------
    sparse : dict of str to Tile
        "fgmp": the activation as the chip stores it; "fp16": the same in FP16, with its zeros; "dense16", "dense8": its
        input before ReLU and batch norm, which has no zeros, all in FP16 and all in FP8; "error": the error, as stored;
        "zero": nothing but zeros.
    dense : NDArray
        Weights of the first three taps: patterns [tap and channel, output channel].
    blocks : dict of str to (NDArray, NDArray)
        Blocks of 64 elements of the same tensors, patterns and codes.
    """

    sparse: dict[str, Tile]
    dense: NDArray[np.uint16]
    blocks: dict[str, tuple[NDArray[np.uint16], NDArray[np.uint8]]]


@lru_cache(maxsize=1)
def make_tiles() -> Tiles:
    """Train a few steps on scikit-learn's digits (width 64, 8x8, dynamic formats), and take operands from the last."""
    count = _BATCH * (_WARM_UP + 1)
    images, labels, classes = load_images(None, image=_IMAGE, count=count, seed=0)
    pixels = normalise(images)
    formats = get_formats("dynamic")
    network = golden.network.Network(
        golden.network.resnet18(width=_WIDTH, classes=classes),
        golden.network.Formats(**{name: getattr(formats, name) for name in asdict(formats)}),
        golden.network.Hyperparameters(rate=0.002, loss_scale=1024.0),
        TARGETS["dynamic"],
    )
    state = network.initial_state(golden.network.initial_parameters(network.layers, pixels.shape[1], 0))
    for at in range(0, count, _BATCH):
        tensors = network.train_step(state, pixels[at : at + _BATCH], labels[at : at + _BATCH]).tensors
    layer = next(one for one in network.layers if one.name == LAYER)
    x, error, weight = tensors[layer.inputs[0]], tensors[f"d.{LAYER}"], tensors[f"w.{LAYER}"]
    values = x.values()
    before = tensors[LAYER].values()
    filled = np.where(before == 0, np.float32(2.0**-10), before)
    found = {
        "fgmp": x,
        "fp16": fgmp(values, "fp16"),
        "error": error,
        "dense16": fgmp(filled, "fp16"),
        "dense8": _all_fp8(filled),
        "zero": fgmp(np.zeros_like(values), "fp16"),
    }
    taps = weight.bits[:, :, 0, :]  # [output, channel, tap]
    return Tiles(
        {name: _tile(tensor) for name, tensor in found.items()},
        np.ascontiguousarray(taps.transpose(2, 1, 0)).reshape(-1, taps.shape[0]),
        {name: _blocks(tensor) for name, tensor in found.items()},
    )


def _all_fp8(values: NDArray[np.float32]) -> Quantised:
    """Every element a non-zero FP8 number: scaled so that the largest are around 128, the smallest raised."""
    scale = int(np.ceil(np.log2(np.abs(values).max()))) - 7
    least = np.float32(2.0 ** (scale - 9))
    return fgmp(
        np.where(np.abs(values) < least, np.copysign(least, values), values), replace(as_policy("fp8"), scale=scale)
    )


def _tile(tensor: Quantised) -> Tile:
    """The first image with a border of padding."""
    bits, codes = (np.moveaxis(part[0], 0, -1) for part in (tensor.bits, tensor.codes))
    border = ((1, 1), (1, 1), (0, 0))
    bits = np.pad(bits, border)
    codes = np.pad(codes, border, constant_values=CODE_PADDING)
    return Tile(bits.reshape(-1, bits.shape[-1]), codes.reshape(-1, codes.shape[-1]))


def _blocks(tensor: Quantised) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Its blocks: the 64 channels of a pixel."""
    return np.moveaxis(tensor.bits, 1, -1).reshape(-1, _WIDTH), np.moveaxis(tensor.codes, 1, -1).reshape(-1, _WIDTH)
