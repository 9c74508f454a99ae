"""Single operations on the simulated chip, as NumPy functions."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from golden.fgmp import FP16_POLICY, Policy, Quantised, as_policy, fgmp
from lnpu.compiler.convolution import (
    Convolution,
    Rounding,
    lower_forward,
    lower_input_grad,
    lower_weight_grad,
    masks_outputs,
)
from lnpu.compiler.layers import Workspace, add_and_mask
from lnpu.compiler.program import Program
from lnpu.compiler.tensor import MemoryMap, RawTensor, Tensor, padded_channels
from lnpu.compiler.tiles import Tile
from lnpu.config import ChipConfig, get_config
from lnpu.ctrl.commands import COMMAND_BYTES, VectorOp
from lnpu.driver import Device, Host, read_raw
from lnpu.formats import TensorKind

__all__ = ["Chip"]

Format = str | Policy


def _array(name: str, value: ArrayLike, dimensions: int) -> NDArray[Any]:
    array = np.asarray(value)
    if array.dtype not in (np.float16, np.float32):
        raise TypeError(f"{name} must be float16 or float32, not {array.dtype}")
    if array.ndim != dimensions or array.size == 0:
        raise ValueError(f"{name} must have {dimensions} dimensions, none of them empty, not shape {array.shape}")
    return array.astype(np.float32)


class Chip:
    """The simulated chip, one operation at a time.

    Operands are quantised by their format ("fp16", "fp8" or a `golden.fgmp.Policy`) and put into the chip's memory; the
    chip computes; the result is read back. `golden` has the same functions with the same arguments.

    Parameters
    ----------
    config : str or ChipConfig
        Name of a configuration, or one of your own.
    memory_bytes : int
        Size of the simulated external memory.
    stall, seed, latency
        Of the memory, see `lnpu.sim.simulator.Simulator`.

    Attributes
    ----------
    counters : dict of str to int
        Performance counters of the last operation.
    device : Device
        What programs run on.
    """

    def __init__(
        self,
        config: str | ChipConfig = "tiny",
        *,
        memory_bytes: int = 64 << 20,
        stall: float = 0.0,
        seed: int = 0,
        latency: int = 8,
        device: Device | None = None,
    ) -> None:
        self.config = get_config(config) if isinstance(config, str) else config
        if device is None:
            from lnpu.sim.simulator import Simulator

            device = Simulator(self.config, memory_bytes, stall=stall, seed=seed, latency=latency)
        self.device = device
        self.host = Host(self.config, device.memory)
        self.counters: dict[str, int] = {}

    def conv2d(
        self,
        x: ArrayLike,
        w: ArrayLike,
        *,
        stride: int = 1,
        padding: int = 0,
        x_format: Format = "fp16",
        w_format: Format = "fp16",
        out_scale: int = 0,
        out: str = "fp16",
        saturate: bool = False,
    ) -> NDArray[Any]:
        """Convolution of x [N, C, H, W] with w [O, C, R, S]: [N, O, Ho, Wo], float16 (or float32 for out="fp32")."""
        x, w = _array("x", x, 4), _array("w", w, 4)
        if x.shape[1] != w.shape[1]:
            raise ValueError(f"w must have {x.shape[1]} input channels like x, not {w.shape[1]}")
        shape = _convolution(x.shape, w.shape[0], w.shape[2:], stride, padding)
        job = _Job(self, shape)
        streamed = job.image("x", x, x_format)
        weight = job.weight(w, w_format)
        return job.run(
            lower_forward,
            streamed,
            weight,
            (shape.batch, shape.outputs, shape.out_height, shape.out_width),
            out_scale,
            out,
            saturate,
        )

    def conv2d_input_grad(
        self,
        dy: ArrayLike,
        w: ArrayLike,
        *,
        input_shape: tuple[int, ...],
        stride: int = 1,
        padding: int = 0,
        mask: ArrayLike | None = None,
        dy_format: Format = "fp16",
        w_format: Format = "fp16",
        mask_format: Format = "fp16",
        out_scale: int = 0,
        out: str = "fp16",
        saturate: bool = False,
    ) -> NDArray[Any]:
        """Gradient for x [N, C, H, W] = `input_shape`, from dy [N, O, Ho, Wo] and w [O, C, R, S]; +0 where `mask`, of
        the same shape, is not positive."""
        dy, w = _array("dy", dy, 4), _array("w", w, 4)
        if len(input_shape) != 4 or input_shape[1] != w.shape[1]:
            raise ValueError(f"input_shape must be (N, {w.shape[1]}, H, W), not {input_shape!r}")
        shape = _convolution(input_shape, w.shape[0], w.shape[2:], stride, padding)
        _check_error(dy, shape)
        job = _Job(self, shape)
        result = shape.batch, shape.channels, shape.height, shape.width
        masks = None
        if mask is not None:
            mask = _array("mask", mask, 4)
            if mask.shape != result:
                raise ValueError(f"mask must have shape {result}, that of the gradient, not {mask.shape}")
            masks = job.image("mask", mask, mask_format)
        return job.run(
            lower_input_grad,
            job.image("dy", dy, dy_format),
            job.weight(w, w_format),
            result,
            out_scale,
            out,
            saturate,
            mask=masks,
        )

    def conv2d_weight_grad(
        self,
        x: ArrayLike,
        dy: ArrayLike,
        *,
        kernel_shape: tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        x_format: Format = "fp16",
        dy_format: Format = "fp16",
        out_scale: int = 0,
        out: str = "fp16",
        saturate: bool = False,
    ) -> NDArray[Any]:
        """Gradient for w [O, C, R, S] with `kernel_shape` = (R, S), from x [N, C, H, W] and dy [N, O, Ho, Wo]."""
        x, dy = _array("x", x, 4), _array("dy", dy, 4)
        if len(kernel_shape) != 2:
            raise ValueError(f"kernel_shape must be (R, S), not {kernel_shape!r}")
        shape = _convolution(x.shape, dy.shape[1], kernel_shape, stride, padding)
        _check_error(dy, shape)
        job = _Job(self, shape)
        return job.run(
            lower_weight_grad,
            job.image("x", x, x_format),
            job.image("dy", dy, dy_format),
            (shape.outputs, shape.channels, *kernel_shape),
            out_scale,
            out,
            saturate,
            weight=True,
        )

    def linear(self, x: ArrayLike, w: ArrayLike, **options: Any) -> NDArray[Any]:
        """x [N, C] times w [O, C] transposed: [N, O]. Options: x_format, w_format, out_scale, out, saturate."""
        x, w = _array("x", x, 2), _array("w", w, 2)
        return self.conv2d(x[:, :, None, None], w[:, :, None, None], **options)[:, :, 0, 0]

    def linear_input_grad(self, dy: ArrayLike, w: ArrayLike, **options: Any) -> NDArray[Any]:
        """dy [N, O] times w [O, C]: [N, C]. Options as of `linear`, with dy_format, mask [N, C] and mask_format."""
        dy, w = _array("dy", dy, 2), _array("w", w, 2)
        shape = (len(dy), w.shape[1], 1, 1)
        if options.get("mask") is not None:
            options["mask"] = _array("mask", options["mask"], 2)[:, :, None, None]
        return self.conv2d_input_grad(dy[:, :, None, None], w[:, :, None, None], input_shape=shape, **options)[
            :, :, 0, 0
        ]

    def linear_weight_grad(self, x: ArrayLike, dy: ArrayLike, **options: Any) -> NDArray[Any]:
        """dy [N, O] transposed times x [N, C]: [O, C]. Options as of `linear`, with x_format and dy_format."""
        x, dy = _array("x", x, 2), _array("dy", dy, 2)
        operands = x[:, :, None, None], dy[:, :, None, None]
        return self.conv2d_weight_grad(*operands, kernel_shape=(1, 1), **options)[:, :, 0, 0]


def _convolution(x: tuple[int, ...], outputs: int, kernel: tuple[int, ...], stride: int, padding: int) -> Convolution:
    batch, channels, height, width = x
    return Convolution(batch, channels, height, width, outputs, kernel[0], kernel[1], stride, padding)


def _check_error(dy: NDArray[Any], shape: Convolution) -> None:
    expected = (shape.batch, shape.outputs, shape.out_height, shape.out_width)
    if dy.shape != expected:
        raise ValueError(f"dy must have shape {expected}, that of the output, not {dy.shape}")


class _Job:
    """One operation: its memory map and program."""

    def __init__(self, chip: Chip, shape: Convolution) -> None:
        self.chip, self.shape = chip, shape
        self.config = chip.config
        self.map = MemoryMap(size=len(chip.device.memory), config=self.config)

    def image(self, name: str, value: NDArray[np.float32], policy: Format) -> Tensor:
        """Put an NCHW operand into memory."""
        policy = as_policy(policy)
        images, channels, height, width = value.shape
        tensor = self.map.tensor(
            name, TensorKind.ACTIVATION, images=images, height=height, width=width, channels=channels, policy=policy
        )
        self.chip.host.write(tensor, fgmp(value, policy))
        return tensor

    def _weight_shape(self) -> dict[str, int]:
        shape = self.shape
        return {
            "height": shape.kernel_height * shape.kernel_width,
            "width": padded_channels(shape.channels, self.config.beat),
            "channels": shape.outputs,
        }

    def weight(self, value: NDArray[np.float32], policy: Format) -> Tensor:
        """Put OIHW weights into memory."""
        policy = as_policy(policy)
        tensor = self.map.tensor("w", TensorKind.WEIGHT, **self._weight_shape(), policy=policy)
        self.chip.host.write_weight(tensor, fgmp(value, policy))
        return tensor

    def run(
        self,
        lower: Callable[..., None],
        first: Tensor,
        second: Tensor,
        result: tuple[int, int, int, int],
        out_scale: int,
        out: str,
        saturate: bool,
        *,
        weight: bool = False,
        mask: Tensor | None = None,
    ) -> NDArray[Any]:
        """Compile, run, and read the result of shape `result` back."""
        if out not in ("fp16", "fp32"):
            raise ValueError(f"out must be fp16 or fp32, not {out!r}")
        chip, host = self.chip, self.chip.host
        policy = FP16_POLICY.with_scale(out_scale)
        if weight:
            tensor = self.map.tensor("dw", TensorKind.GRADIENT, **self._weight_shape(), policy=policy)
        else:
            images, channels, height, width = result
            tensor = self.map.tensor(
                "out",
                TensorKind.ACTIVATION,
                images=images,
                height=height,
                width=width,
                channels=channels,
                policy=policy,
            )
        program = Program(self.config)
        space = Workspace(program)
        raw: RawTensor | None = None
        if out == "fp32":
            raw = self.map.raw(
                "out (FP32)", TensorKind.OTHER, rows=tensor.lines * tensor.width, channels=tensor.channels
            )

        options: dict[str, Any] = {}
        in_cores = mask is not None and masks_outputs(program, self.shape, tensor)
        if mask is not None:
            options = {"mask": mask} if in_cores else {"reserve": 1}

        def store(tile: Tile, place: int, first: bool, scratch: list[int]) -> None:
            if mask is not None:
                if not in_cores:
                    space.vectors.load(mask, tile, scratch[0])
                    add_and_mask(space, tile, place, [], scratch[0])
                if raw is not None:  # an encoded tensor has no -0
                    space.vectors.vector(VectorOp.ADD, place, place, 0.0, inner=tile.size)
            if raw is None:
                space.vectors.store(tensor, tile, place)
                return
            for index in range(tile.images * tile.lines):
                image, line = divmod(index, tile.lines)
                row = ((tile.image + image) * tensor.height + tile.line + line) * tensor.width + tile.pixel
                at = place + index * tile.pixels * tile.rows
                space.vectors.store_raw(raw, at, row=row, rows=tile.pixels, block=tile.block)

        rounding = Rounding(out == "fp16", out_scale, saturate)
        areas = {"vmem": space.tiles, "vmem_end": space.end}
        lower(program, self.shape, first, second, tensor, rounding, store, **areas, **options)
        program.end()
        address = self.map.allocate("the program", program.size, COMMAND_BYTES)
        image = np.frombuffer(program.encode(), np.uint8)
        chip.device.memory[address : address + len(image)] = image
        if hasattr(chip.device, "clear_counters"):
            chip.device.clear_counters()
        chip.device.run_program(address, len(program.commands))
        if hasattr(chip.device, "counters"):
            chip.counters = chip.device.counters()
        if raw is not None:
            words = read_raw(chip.device.memory, raw)
            if weight:
                return host.read_master(raw, result, tensor.width)
            return words.reshape(tensor.images, tensor.height, tensor.width, -1).transpose(0, 3, 1, 2).copy()
        value: Quantised = host.read_weight(tensor, result) if weight else host.read(tensor)
        return np.ascontiguousarray(value.bits).view(np.float16)
