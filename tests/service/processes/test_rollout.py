"""The rollout of versions, whatever ends or fails in the middle, as a machine of states.

Workers and front ends are what they tell and are told: here each does its next step when the test
says so, or ends.
"""

import asyncio
import os
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.models.card import ModelFacts
from service.models.lineup import Lineup, ModelEntry
from service.processes.board import Board, Extent
from service.processes.channel import from_memory, in_memory
from service.processes.child import Child
from service.processes.messages import Follows, Load, Loaded, Models, NotLoaded, Unload, Unloaded
from service.processes.rollout import Rollout, places
from service.reloading import Outcome
from service.settings.settings import Settings

WORKERS, FRONT_ENDS = 2, 2
NAMES = "abc"


class Told:
    """A process as far as the rollout knows it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.useful = 0
        self.inbox: deque[Any] = deque()
        self.has: dict[int, str] = {}  # what it has at each place
        self.serving: tuple[int, ...] = ()  # of a front end
        self.generation = -1

    def send(self, message: Any, descriptors: Any = ()) -> None:
        content = from_memory(os.dup(descriptors[0])) if descriptors else None
        self.inbox.append((message, content))

    def is_useful(self) -> None:
        self.useful += 1


class Reloading(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.wanted: dict[str, str] = {}
        self.before: dict[str, str] = {}
        self.reloading: asyncio.Task[Any] | None = None

    def lineup(self, models: dict[str, str]) -> Lineup:
        return Lineup(models=tuple(ModelEntry(name=n, version=v) for n, v in models.items()))

    @initialize(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def start(self, names: set[str]) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = TemporaryDirectory()
        self.wanted = dict.fromkeys(sorted(names), "0")
        lineup = self.lineup(self.wanted)
        self.board = Board.create(Extent(2 * FRONT_ENDS, WORKERS, places(lineup)))
        self.workers = [Told(f"worker-{n}") for n in range(WORKERS)]
        self.front_ends = [Told(f"front-end-{n}") for n in range(FRONT_ENDS)]
        self.rollout = Rollout(
            Settings(),
            lineup,
            self.board,
            cast("list[Child]", self.workers),
            cast("list[Child]", self.front_ends),
            folder=Path(self.folder.name),
        )
        for index in range(WORKERS):
            self.rollout.worker_begins(index)
        for index in range(FRONT_ENDS):
            self.rollout.front_end_begins(index)

    def turn(self) -> None:
        for _ in range(5):
            self.loop.run_until_complete(asyncio.sleep(0))

    # What processes do

    @rule(index=st.integers(0, WORKERS - 1), works=st.booleans())
    def worker_goes_on(self, index: int, works: bool) -> None:
        worker = self.workers[index]
        if not worker.inbox:
            return
        message, content = worker.inbox.popleft()
        if isinstance(message, Load):
            first = not worker.has
            for place, entry in content:
                assert place not in worker.has, "two versions at one place"
                if not works and not first:
                    self.rollout.of_worker(index, NotLoaded(place, "told to fail"), [])
                    continue
                worker.has[place] = entry.name + entry.version
                card = SimpleNamespace(name=entry.name, version=entry.version)
                facts = in_memory(ModelFacts(None, cast(Any, card), (), 1))
                self.rollout.of_worker(index, Loaded(place, entry.name, entry.version), [facts])
        else:
            assert isinstance(message, Unload)
            for front_end in self.front_ends:
                mine = front_end.has.get(message.place)
                assert mine is None or mine != worker.has.get(message.place), "it is still used"
            worker.has.pop(message.place, None)
            self.rollout.of_worker(index, Unloaded(message.place), [])
        self.turn()

    @rule(index=st.integers(0, WORKERS - 1))
    def worker_ends(self, index: int) -> None:
        self.workers[index].inbox.clear()
        self.workers[index].has.clear()
        self.rollout.worker_ended(index)
        self.turn()
        self.rollout.worker_begins(index)
        self.turn()

    @rule(index=st.integers(0, FRONT_ENDS - 1))
    def front_end_goes_on(self, index: int) -> None:
        front_end = self.front_ends[index]
        if not front_end.inbox:
            return
        message, content = front_end.inbox.popleft()
        assert isinstance(message, Models)
        front_end.generation, front_end.serving = message.generation, tuple(content)
        for place, facts in content.items():
            name = facts.card.name + facts.card.version
            assert front_end.has.setdefault(place, name) == name, "two versions at one place"
        self.tell(index)

    @rule(index=st.integers(0, FRONT_ENDS - 1))
    def last_requests_of_a_version_end(self, index: int) -> None:
        front_end = self.front_ends[index]
        left = [place for place in front_end.has if place not in front_end.serving]
        if left:
            del front_end.has[left[0]]
            self.tell(index)

    def tell(self, index: int) -> None:
        front_end = self.front_ends[index]
        self.rollout.of_front_end(index, Follows(front_end.generation, tuple(front_end.has)))
        self.turn()

    @rule(index=st.integers(0, FRONT_ENDS - 1))
    def front_end_ends(self, index: int) -> None:
        front_end = self.front_ends[index]
        front_end.inbox.clear()
        front_end.has.clear()
        front_end.serving, front_end.generation = (), -1
        self.rollout.front_end_ended(index)
        self.turn()
        self.rollout.front_end_begins(index)
        self.turn()

    # Reloads

    @precondition(lambda self: self.reloading is None)
    @rule(changed=st.sets(st.sampled_from(NAMES)), gone=st.sets(st.sampled_from(NAMES)))
    def reload(self, changed: set[str], gone: set[str]) -> None:
        self.count += 1
        wanted = self.wanted | {name: str(self.count) for name in sorted(changed)}
        wanted = {name: version for name, version in wanted.items() if name not in gone}
        if wanted:
            self.before, self.asked = self.wanted, wanted
            self.reloading = self.loop.create_task(self.rollout.reload(self.lineup(wanted)))
            self.turn()

    @invariant()
    def outcomes_say_what_serves(self) -> None:
        if self.reloading is None or not self.reloading.done():
            return
        outcomes: dict[str, Outcome] = self.reloading.result()
        self.reloading = None
        assert outcomes.keys() == self.before.keys() | self.asked.keys()
        failed = any(outcome.became == "failed" for outcome in outcomes.values())
        self.wanted = {name: one.version for name, one in outcomes.items() if one.version}
        for name, one in outcomes.items():
            before, asked = self.before.get(name, ""), self.asked.get(name, "")
            assert (one.became, one.version) in {
                ("unchanged" if before == asked else "reloaded" if before else "added", asked),
                ("failed", before),
                ("kept" if failed else "removed", before),
            }
            if one.became == "removed":
                del self.wanted[name]
        assert sorted(self.rollout.names) == sorted(self.wanted)

    @invariant()
    def front_ends_serve_what_all_workers_had(self) -> None:
        for front_end in getattr(self, "front_ends", []):
            for place in front_end.serving:
                assert place in front_end.has

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.everybody_has_what_serves_when_nothing_ends_any_more()
        finally:
            if self.reloading is not None:
                self.reloading.cancel()
                self.turn()
            self.rollout.close()
            self.loop.close()
            self.folder.cleanup()

    def everybody_has_what_serves_when_nothing_ends_any_more(self) -> None:
        for _ in range(60):
            for index in range(WORKERS):
                self.worker_goes_on(index, True)
            for index in range(FRONT_ENDS):
                self.front_end_goes_on(index)
                self.last_requests_of_a_version_end(index)
        self.turn()
        self.outcomes_say_what_serves()
        assert self.reloading is None, "the reload does not end"
        serving = {name + version for name, version in self.wanted.items()}
        for process in (*self.workers, *self.front_ends):
            assert set(process.has.values()) == serving
        assert all(worker.useful for worker in self.workers)


TestReloading = Reloading.TestCase
TestReloading.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
