"""The area of a chip as a treemap."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lnpu.page import new_figure

__all__ = ["Box", "squarify", "treemap"]

Box = tuple[float, float, float, float]
"""Left, bottom, width, height."""


def squarify(areas: Sequence[float], box: Box) -> list[Box]:
    """Divide a box among areas, largest first, into boxes near to squares.

    Parameters
    ----------
    areas : sequence of float
        Positive, in descending order.
    box : Box
        What to divide: the boxes share it in proportion to the areas.

    Returns
    -------
    list of Box
        One for each area.
    """
    if any(area <= 0 for area in areas) or list(areas) != sorted(areas, reverse=True):
        raise ValueError(f"areas must be positive and in descending order, not {list(areas)!r}")
    left, bottom, width, height = box
    scale = width * height / sum(areas) if areas else 0.0
    rest = [area * scale for area in areas]
    boxes: list[Box] = []
    while rest:
        side = min(width, height)
        # A row along the shorter side takes areas as long as its worst box becomes squarer.
        number = 1
        while number < len(rest) and _worst(rest[: number + 1], side) <= _worst(rest[:number], side):
            number += 1
        row, rest = rest[:number], rest[number:]
        depth, at = sum(row) / side, 0.0
        for area in row:
            length = area / depth
            upright = height <= width
            boxes.append((left, bottom + at, depth, length) if upright else (left + at, bottom, length, depth))
            at += length
        if height <= width:
            left, width = left + depth, width - depth
        else:
            bottom, height = bottom + depth, height - depth
    return boxes


def _worst(row: Sequence[float], side: float) -> float:
    """Longest side over shortest of the worst box in a row."""
    depth = sum(row) / side
    return max(max(area / depth**2, depth**2 / area) for area in row)


def treemap(result: Mapping[str, Any]) -> tuple[Figure, float]:
    """The logic of a chip by module: every module's own gates, of all its instances together; SRAM not counted."""
    blocks = {name: block["own_area"] * block["instances"] for name, block in result["blocks"].items()}
    largest = sorted(((area, name) for name, area in blocks.items() if area > 0), reverse=True)
    total = sum(area for area, _ in largest)
    width = 10.0
    figure, (axis,) = new_figure(6.0, width=width)
    axis.set_axis_off()
    colours = colormaps["tab20c"]
    boxes = squarify([area for area, _ in largest], (0.0, 0.0, 10.0, 6.0))
    for index, ((area, name), (x, y, w, h)) in enumerate(zip(largest, boxes, strict=True)):
        axis.add_patch(Rectangle((x, y), w, h, facecolor=colours(index % 20), edgecolor="white", linewidth=1.0))
        number = result["blocks"][name]["instances"]
        text = f"{name.removeprefix('lnpu_')}\n{number} x, {area / total:.1%}"
        size = min(11.0, 105 * w / max(map(len, text.split("\n"))), 30 * h)
        if size >= 5:
            axis.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)
    axis.set_xlim(0, 10)
    axis.set_ylim(0, 6)
    return figure, width
