"""The order of a lowering's commands: loads run ahead of the products, and results leave beside them.

Commands start in program order, and a unit takes a command when it is idle or about to be, so order is what lets units
overlap. A lowering is a sequence of *rounds*, in which each team of cores adds up one set of partial sums; a round is a
sequence of *steps*, in which a team works on what its buffers hold at a time.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

from lnpu.compiler.program import Emission, Program, Region, merged
from lnpu.ctrl.commands import Opcode, Unit, unit_of

__all__ = ["Pipeline", "Product", "Result"]

Emit = Callable[[], None]
"""Emits some commands."""

_LOADS = (Opcode.LOAD, Opcode.LOAD_RAW)
_STORES = (Opcode.STORE, Opcode.STORE_RAW, Opcode.COMMIT)


@dataclass(frozen=True)
class Product:
    """What a team of cores does in a step: a load for it alone, then its MULTIPLYs, one a core."""

    team: int
    load: Emit | None
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


@dataclass
class _Round:
    steps: list[_Step] = field(default_factory=list)
    results: Sequence[Result] = ()


class Pipeline:
    """Collects the steps and rounds of a lowering, then emits its commands.

    Parameters
    ----------
    program : Program
    sums : int
        Rows of partial sums in a round. With room for two rounds' in the store, a team drains one while it adds up the
        next; otherwise it drains just before.
    ahead : bool
        The first load of each LOAD unit in a step comes before the MULTIPLYs of the step before, so that the units go
        on while these wait for their data. That is for steps whose loads take longer than their products: in others,
        cores would wait for MULTIPLYs behind a load that waits for its page.
    """

    def __init__(self, program: Program, sums: int, *, ahead: bool) -> None:
        self.program, self.ahead = program, ahead
        self.double = 2 * sums <= program.config.psum_rows
        self._bases = [0, sums] if self.double else [0]
        self._rounds = [_Round()]
        self._begun = False
        self._results: list[Result] = []  # of the round before; not yet drained
        self._due: list[Emit] = []  # what follows the loads of the last step
        self._due_reads: list[Region] = []  # of its MULTIPLYs
        self._units_ahead: set[Unit] = set()  # whose next load has come before it
        self._background: deque[Emission] = deque()
        self._loads_left = 0  # of this round, about
        self._stores: list[Emission] = []  # of the last epilogue: they come after the next one's computation
        self._late: list[Emission] = []  # those of a round of a single step: after the next one's loads

    def begin_round(self) -> int:
        """The first row of the next round's partial sums."""
        return self._bases[(len(self._rounds) - 1) % len(self._bases)]

    def step(self, shared: Sequence[Emit], products: Sequence[Product], key: Hashable = None) -> None:
        """Add a step: loads for several teams, then each product's load and MULTIPLYs.

        Steps with the same `key` (other than None) follow each other and have the same products' loads; those of the
        next key are spread over them. A load that is there already must emit nothing.
        """
        self._rounds[-1].steps.append(_Step(shared, products, key))

    def end_round(self, results: Sequence[Result]) -> None:
        """The partial sums are complete once the steps so far are done."""
        self._rounds[-1].results = results
        self._rounds.append(_Round())

    def run(self) -> None:
        """Emit everything."""
        steps = [step for round_ in self._rounds for step in round_.steps]
        following = list(range(1, len(steps) + 1))  # step with the next key
        for index in range(len(steps) - 2, -1, -1):
            if steps[index].key is not None and steps[index].key == steps[index + 1].key:
                following[index] = following[index + 1]
        index = fetched = 0
        key: Hashable = None
        for round_ in self._rounds:
            self._loads_left = 0
            for step in round_.steps:
                new = step.key is None or step.key != key
                own = sum(product.load is not None for product in step.products) if new else 0
                self._loads_left += len(step.shared) + own
                key = step.key
            for step in round_.steps:
                self._step(step, alone=len(round_.steps) == 1)
                ahead = following[index]
                if step.key is not None and ahead < len(steps):
                    fetched = self._prefetch(steps[ahead].products, fetched, ahead - index)
                index += 1
                if index == ahead:
                    fetched = 0
            self._defer(partial(self._end, round_.results, alone=len(round_.steps) == 1))
        self._release()

    def _step(self, step: _Step, *, alone: bool) -> None:
        """A step; `alone` in its round: no other one has loads for results to leave beside."""
        for load in step.shared:
            self._load(load)
        if not self._begun:  # nothing computes yet: each team begins as soon as it can
            self._begun = True
            for product in step.products:
                if product.load is not None:
                    product.load()
                self._multiply([self.program.record(product.multiply)])
            return
        for product in step.products:
            self._load(product.load)
        self._release()
        multiplies = [self.program.record(product.multiply) for product in step.products]
        self._due_reads = [region for some in multiplies for emission in some for region in emission.reads]
        self._defer(partial(self._compute, [product.team for product in step.products], multiplies, alone))

    def _compute(self, teams: Sequence[int], multiplies: Sequence[list[Emission]], alone: bool) -> None:
        """The MULTIPLYs of a step, a list of them for each team."""
        if self.double or not self._results:
            self._multiply(multiplies)
            self._play_late()
        else:
            self._play_late()
            for team, own in zip(teams, multiplies, strict=True):
                self._drain(team)
                self._multiply([own])
                if alone:
                    self._play_background()
        self._to_background()

    def _multiply(self, multiplies: Sequence[list[Emission]]) -> None:
        """MULTIPLYs of some teams; cores that do the same share one."""
        self.program.play(merged(emission for own in multiplies for emission in own))

    def _end(self, results: Sequence[Result], *, alone: bool) -> None:
        """The end of a round; of a single step, the last stores wait for drains, and the next loads shall not."""
        if alone:
            self._to_background()
            self._play_background()
            self._late, self._stores = self._stores, []
        else:
            self._flush()
        self._results = list(results)

    def _defer(self, emit: Emit) -> None:
        """Emit this when the next step's first loads are there."""
        self._due.append(emit)
        if not self.ahead:
            self._release()

    def _release(self) -> None:
        for emit in self._due:
            emit()
        self._due.clear()
        self._due_reads.clear()
        self._units_ahead.clear()

    def _prefetch(self, products: Sequence[Product], fetched: int, steps: int) -> int:
        """Emit some loads of the next key, of which `fetched` are there and all must be after `steps` such calls;
        returns how many are there then."""
        count = -(-(len(products) - fetched) // steps)
        for product in products[fetched : fetched + count]:
            self._load(product.load)
        return fetched + count

    def _flush(self) -> None:
        """Emit every drain and epilogue that is due."""
        self._play_late()
        self._to_background()
        self._background.extend(self._stores)
        self._stores.clear()
        self._play_background()

    def _play_background(self) -> None:
        self.program.play(self._background)
        self._background.clear()

    def _play_late(self) -> None:
        self.program.play(self._late)
        self._late = []

    def _load(self, load: Emit | None) -> None:
        """A load, and its share of the drains and epilogues that are due."""
        loads = self.program.record(load) if load is not None else []
        if not loads:  # there is none, or it is there already
            return
        for emission in loads:
            unit = unit_of(emission.opcode, emission.fields)
            used = any(mine.overlaps(theirs) for mine in emission.writes for theirs in self._due_reads)
            if used or unit in self._units_ahead:
                self._release()
            self._units_ahead.add(unit)
            self.program.play([emission])
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
