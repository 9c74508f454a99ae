"""The order of a lowering's commands: loads run ahead of the products, and results leave beside them.

Commands start in program order and a unit takes a command only when it is idle, so order is what lets units overlap.
A lowering is a sequence of *rounds*, in which each team of cores adds up one set of partial sums; a round is a sequence
of *steps*, in which a team works on what its buffers hold at a time.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Pipeline", "Product", "Result"]

Emit = Callable[[], None]
"""Emits some commands."""

_ITEMS = 2
"""Drains or epilogues that are emitted behind each load."""


@dataclass(frozen=True)
class Product:
    """What a team of cores does in a step: a load for it alone, then its MULTIPLYs."""

    team: int
    load: Emit
    multiply: Emit


@dataclass(frozen=True)
class Result:
    """What becomes of a team's partial sums after a round: DRAINs, and the epilogue if they complete a tile."""

    team: int
    drain: Emit
    epilogue: Emit | None = None


class Pipeline:
    """Emits the commands of a lowering.

    Parameters
    ----------
    double : bool
        The partial sums of consecutive rounds are in different rows: a team drains while it adds up the next round.
        Otherwise it drains just before.
    """

    def __init__(self, *, double: bool) -> None:
        self.double = double
        self._begun = False
        self._results: list[Result] = []  # of the round before; not yet drained
        self._background: deque[Emit] = deque()

    def step(self, shared: Sequence[Emit], products: Sequence[Product]) -> None:
        """Emit a step: loads for several teams, then each product's load and MULTIPLYs."""
        for load in shared:
            self._load(load)
        if not self._begun:  # nothing computes yet: each team begins as soon as it can
            self._begun = True
            for product in products:
                product.load()
                product.multiply()
            return
        for product in products:
            self._load(product.load)
        for product in products:
            if not self.double:
                self._drain(product.team)
            product.multiply()
        self._to_background()

    def end_round(self, results: Sequence[Result]) -> None:
        """The partial sums are complete once the steps so far are done."""
        self.flush()
        self._results = list(results)

    def flush(self) -> None:
        """Emit every drain and epilogue that is due."""
        self._to_background()
        while self._background:
            self._background.popleft()()

    def _load(self, load: Emit) -> None:
        load()
        for _ in range(min(_ITEMS, len(self._background))):
            self._background.popleft()()

    def _drain(self, team: int) -> None:
        """Drain what this team has summed up in the round before."""
        for result in [result for result in self._results if result.team == team]:
            result.drain()
            if result.epilogue is not None:
                self._background.append(result.epilogue)
            self._results.remove(result)

    def _to_background(self) -> None:
        """Drains, each followed by the epilogue of the one before: that can start when the next drain does."""
        before: Emit | None = None
        for result in self._results:
            self._background.append(result.drain)
            if before is not None:
                self._background.append(before)
            before = result.epilogue
        if before is not None:
            self._background.append(before)
        self._results.clear()
