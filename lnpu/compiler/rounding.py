"""How results leave the cores, and what is fused onto them."""

from collections.abc import Callable
from dataclasses import dataclass

from lnpu.compiler.tensor import Tensor
from lnpu.compiler.tiles import Tile

__all__ = ["Epilogue", "Rounding"]


@dataclass(frozen=True)
class Rounding:
    """How exact sums leave the cores: divided by 2^scale and rounded to FP16 or FP32.

    What comes to the vector memory is the rounded value times 2^scale in FP16, the rounded value in FP32.
    """

    fp16: bool
    scale: int = 0
    saturate: bool = False

    def of(self, out: Tensor) -> tuple[int, int]:
        """For results of tensor `out`: the scale that DRAIN names, and the state whose scale the chip adds."""
        return (0, out.state) if self.fp16 and out.state else (self.scale, 0)


Epilogue = Callable[[Tile, int, bool, list[int]], None]
"""Does what is fused onto an output tile, and stores it.

Called with the tile, the vector-memory row it is at, whether it is the first tile of its channel block, and the first
rows of the areas (each as large as a tile) that it asked for.
"""
