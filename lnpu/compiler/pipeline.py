"""The order of a lowering's commands: loads run ahead of the products, and results leave beside them.

Commands start in program order, and a unit takes a command when it is idle or about to be, so order is what lets units
overlap.
A lowering is a sequence of *rounds*, in which each team of cores adds up one set of partial sums; a round is a sequence
of *steps*, in which a team works on what its buffers hold at a time.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from lnpu.compiler.program import Emission, Program, merged
from lnpu.ctrl.commands import Opcode

__all__ = ["Pipeline", "Product", "Result"]

Emit = Callable[[], None]
"""Emits some commands."""

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


@dataclass(frozen=True)
class _Step:
    shared: Sequence[Emit]
    products: Sequence[Product]
    key: Hashable


class Pipeline:
    """Collects the steps and rounds of a lowering, then emits its commands.

    Parameters
    ----------
    program : Program
    double : bool
        The partial sums of consecutive rounds are in different rows: a team drains while it adds up the next round.
        Otherwise it drains just before.
    """

    def __init__(self, program: Program, *, double: bool) -> None:
        self.program, self.double = program, double
        self._records: list[_Step | Sequence[Result]] = []
        self._begun = False
        self._results: list[Result] = []  # of the round before; not yet drained
        self._background: deque[Emission] = deque()
        self._loads_left = 0  # of this round, about
        self._stores: list[Emission] = []  # of the last epilogue: they come after the next one's computation

    def step(self, shared: Sequence[Emit], products: Sequence[Product], key: Hashable = None) -> None:
        """Add a step: loads for several teams, then each product's load and MULTIPLYs.

        Steps with the same `key` (other than None) follow each other and have the same products' loads; those of the
        next key are spread over them. A load that is there already must emit nothing.
        """
        self._records.append(_Step(shared, products, key))

    def end_round(self, results: Sequence[Result]) -> None:
        """The partial sums are complete once the steps so far are done."""
        self._records.append(results)

    def run(self) -> None:
        """Emit everything."""
        steps = [record for record in self._records if isinstance(record, _Step)]
        following = list(range(1, len(steps) + 1))  # step with the next key
        for index in range(len(steps) - 2, -1, -1):
            if steps[index].key is not None and steps[index].key == steps[index + 1].key:
                following[index] = following[index + 1]
        rounds = self._loads_of_rounds()
        self._loads_left = rounds.popleft()
        index = fetched = 0
        for record in self._records:
            if isinstance(record, _Step):
                self._step(record)
                ahead = following[index]
                if record.key is not None and ahead < len(steps):
                    fetched = self._prefetch(steps[ahead].products, fetched, ahead - index)
                index += 1
                if index == ahead:
                    fetched = 0
            else:
                self._flush()
                self._results = list(record)
                self._loads_left = rounds.popleft()
        self._flush()

    def _loads_of_rounds(self) -> deque[int]:
        """Loads in each round, and 0 for what is after the last."""
        counts, key = deque([0]), None
        for record in self._records:
            if not isinstance(record, _Step):
                counts.append(0)
                continue
            counts[-1] += len(record.shared)
            if record.key is None or record.key != key:
                counts[-1] += len(record.products)
            key = record.key
        return counts

    def _step(self, step: _Step) -> None:
        for load in step.shared:
            self._load(load)
        if not self._begun:  # nothing computes yet: each team begins as soon as it can
            self._begun = True
            for product in step.products:
                product.load()
                product.multiply()
            return
        for product in step.products:
            self._load(product.load)
        if self.double or not self._results:
            multiplies = [emission for product in step.products for emission in self.program.record(product.multiply)]
            self.program.play(merged(multiplies))
        else:
            for product in step.products:
                self._drain(product.team)
                product.multiply()
        self._to_background()

    def _prefetch(self, products: Sequence[Product], fetched: int, steps: int) -> int:
        """Emit some loads of the next key, of which `fetched` are there and all must be after `steps` such calls;
        returns how many are there then."""
        count = -(-(len(products) - fetched) // steps)
        for product in products[fetched : fetched + count]:
            self._load(product.load)
        return fetched + count

    def _flush(self) -> None:
        """Emit every drain and epilogue that is due."""
        self._to_background()
        self._background.extend(self._stores)
        self._stores.clear()
        self.program.play(self._background)
        self._background.clear()

    def _load(self, load: Emit) -> None:
        """A load, and its share of the drains and epilogues that are due."""
        loads = self.program.record(load)
        self.program.play(loads)
        if not loads:  # it is there already
            return
        for _ in range(-(-len(self._background) // max(1, self._loads_left))):
            self.program.play([self._background.popleft()])
        self._loads_left -= 1

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
