"""How the cores are divided, and where the tiles that they work on lie in the vector memory."""

from collections.abc import Iterable

from lnpu.config import ChipConfig

__all__ = ["Share", "Teams"]

Share = dict[int, tuple[int, int]]
"""Output channels that each core of a team works on at a time: the first and how many, by its number in the team."""


class Teams:
    """Teams of cores: each works on a tile of its own, its cores on different output channels of it.

    Parameters
    ----------
    config : ChipConfig
    channels : int
        Output channels of a tile.
    vmem, vmem_end : int
        Rows of the vector memory for tiles and scratch areas.
    reserve : int
        Scratch areas, each as large as a tile.

    Attributes
    ----------
    count, size : int
        Teams, and cores in each.
    areas, scratch : list of int
        First rows of areas for tiles, to be taken in turn, and of the scratch areas. With few teams there is one more
        than teams, so that a tile can be stored while the next one is drained.
    area : int
        Rows of an area.
    """

    def __init__(self, config: ChipConfig, channels: int, vmem: int, vmem_end: int, reserve: int) -> None:
        self.lanes, self.channels = config.lanes, channels
        self.size = min(config.cores, -(-channels // config.lanes))
        self.count = config.cores // self.size
        tiles = self.count + (self.count < 4)
        self.area = (vmem_end - vmem) // (tiles + reserve)
        areas = [vmem + i * self.area for i in range(tiles + reserve)]
        self.areas, self.scratch = areas[:tiles], areas[tiles:]

    @property
    def chunk(self) -> int:
        """Most output channels that a team works on at a time."""
        return min(self.channels, self.size * self.lanes)

    def shares(self) -> list[Share]:
        """The shares that make up all channels of a tile, one after the other."""
        return [
            {
                core: (first, min(self.lanes, self.channels - first))
                for core in range(self.size)
                if (first := chunk + core * self.lanes) < self.channels
            }
            for chunk in range(0, self.channels, self.size * self.lanes)
        ]

    def core(self, team: int, member: int) -> int:
        """Number of a core."""
        return team * self.size + member

    def mask(self, teams: Iterable[int], members: Iterable[int]) -> int:
        """These cores of these teams, as a bit mask."""
        members = list(members)
        return sum(1 << self.core(team, member) for team in teams for member in members)
