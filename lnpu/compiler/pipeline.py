"""The order of a lowering's commands: loads run ahead of the products, and results leave beside them.

Commands start in program order and a unit takes a command only when it is idle, so order is what lets units overlap.
A lowering is a sequence of *rounds*, in which each team of cores adds up one set of partial sums; a round is a sequence
of *steps*, in which a team works on what its buffers hold at a time.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lnpu.compiler.program import Emission, Program, merged
from lnpu.ctrl.commands import Opcode

__all__ = ["Pipeline", "Product", "Result"]

Emit = Callable[[], None]
"""Emits some commands."""

_BEHIND = 3
"""Commands of drains and epilogues that are emitted behind each load."""

_LOADS = (Opcode.LOAD, Opcode.LOAD_RAW)
_STORES = (Opcode.STORE, Opcode.STORE_RAW, Opcode.COMMIT)


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
    program : Program
    double : bool
        The partial sums of consecutive rounds are in different rows: a team drains while it adds up the next round.
        Otherwise it drains just before.
    """

    def __init__(self, program: Program, *, double: bool) -> None:
        self.program, self.double = program, double
        self._begun = False
        self._results: list[Result] = []  # of the round before; not yet drained
        self._background: deque[Emission] = deque()
        self._stores: list[Emission] = []  # of the last epilogue: they come after the next one's computation

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
        if self.double or not self._results:
            multiplies = [emission for product in products for emission in self.program.record(product.multiply)]
            self.program.play(merged(multiplies))
        else:
            for product in products:
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
        self._background.extend(self._stores)
        self._stores.clear()
        self.program.play(self._background)
        self._background.clear()

    def _load(self, load: Emit) -> None:
        load()
        for _ in range(min(_BEHIND, len(self._background))):
            self.program.play([self._background.popleft()])

    def _drain(self, team: int) -> None:
        """Drain what this team has summed up in the round before."""
        for result in [result for result in self._results if result.team == team]:
            result.drain()
            self._queue(result, [])
            self._results.remove(result)

    def _to_background(self) -> None:
        for result in self._results:
            self._queue(result, self.program.record(result.drain))
        self._results.clear()

    def _queue(self, result: Result, drain: list[Emission]) -> None:
        """A drain and an epilogue; what the epilogue loads comes first, the stores of the one before in between."""
        epilogue = [] if result.epilogue is None else self.program.record(result.epilogue)
        loads = 0
        while loads < len(epilogue) and epilogue[loads].opcode in _LOADS:
            loads += 1
        stores = len(epilogue)
        while stores > loads and epilogue[stores - 1].opcode in _STORES:
            stores -= 1
        self._background.extend(drain + epilogue[:loads] + self._stores + epilogue[loads:stores])
        self._stores = epilogue[stores:]
