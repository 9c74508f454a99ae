"""Dynamic loss scaling: as large a factor on the loss gradient as FP16 takes without an overflow."""

from dataclasses import dataclass

__all__ = ["LossScaler", "LossScaling"]


@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the loss scale moves.

    Parameters
    ----------
    start : int
        Exponent of the first scale, 2^start.
    interval : int
        Clean steps after which the scale doubles; 0: never.
    least, most : int
        Exponents between which it moves.

    Raises
    ------
    ValueError
        If not least <= start <= most, or `interval` is negative.
    """

    start: int = 10
    interval: int = 2000
    least: int = 0
    most: int = 24

    def __post_init__(self) -> None:
        if not self.least <= self.start <= self.most:
            raise ValueError(f"start must be {self.least} to {self.most}, not {self.start!r}")
        if self.interval < 0:
            raise ValueError(f"interval must be at least 0, not {self.interval!r}")


class LossScaler:
    """The loss scale from step to step.

    Parameters
    ----------
    config : LossScaling

    Attributes
    ----------
    exponent : int
        The scale is 2^exponent, so that dividing by it is exact.
    clean : int
        Steps without an overflow since the scale changed.
    skipped : int
        Updates skipped in all.
    """

    def __init__(self, config: LossScaling | None = None) -> None:
        self.config = config or LossScaling()
        self.exponent, self.clean, self.skipped = self.config.start, 0, 0

    @property
    def scale(self) -> float:
        """Factor on the loss gradient of the next step."""
        return 2.0**self.exponent

    def step(self, overflow: bool) -> bool:
        """Take note of a backward pass; whether its gradients may be used.

        Parameters
        ----------
        overflow : bool
            A rounded result or a stored element of the pass was infinite or NaN.
        """
        if overflow:
            self.exponent = max(self.exponent - 1, self.config.least)
            self.clean = 0
            self.skipped += 1
            return False
        self.clean += 1
        if self.config.interval and self.clean >= self.config.interval:
            self.exponent = min(self.exponent + 1, self.config.most)
            self.clean = 0
        return True

    def state(self) -> dict[str, int]:
        """What `restore` takes."""
        return {"exponent": self.exponent, "clean": self.clean, "skipped": self.skipped}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a state.

        Raises
        ------
        KeyError
            If something is missing.
        """
        self.exponent, self.clean, self.skipped = (int(state[name]) for name in ("exponent", "clean", "skipped"))
