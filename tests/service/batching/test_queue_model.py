"""The queue against a plain model of it, whatever comes in whatever order, in virtual time.

The model knows who waits, in which class and since when. It says who is admitted, who is in the
next batch, and which outcomes a request can have.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.batching.dispatch import Dispatch
from service.batching.forecast import Forecast
from service.errors import DeadlineExceeded, Draining, EngineFailed, Overloaded
from tests.service.batching.test_batcher import Seat, opened, value
from tests.virtual_time import VirtualTime

PRIORITIES = st.sampled_from(["high", "low"])


@dataclass(eq=False)
class Request:
    """What the model knows of a request of one image."""

    priority: str
    since: float
    deadline: float
    due: float = inf
    outcome: asyncio.Task[int] = field(init=False)
    runs: list["Run"] = field(default_factory=list)
    left: bool = False


@dataclass(eq=False)
class Run:
    """A batch, or a part of one, on a device."""

    requests: Sequence[Request]
    end: asyncio.Future[None]
    result: str = "running"


class QueueModel(RuleBasedStateMachine):
    """Runs the batcher beside the model."""

    @initialize(max_batch=st.integers(1, 4), limit=st.integers(1, 12), devices=st.integers(1, 2))
    def open(self, max_batch, limit, devices):
        self.time = VirtualTime()
        self.max_batch, self.limit = max_batch, limit
        self.requests: list[Request] = []
        self.waiting: list[Request] = []  # in the order in which they came
        self.running: list[Run] = []
        self.failed_parts: list[Request] = []
        self.draining = self.impatient = False
        self.time.run(self.begin(devices))

    async def begin(self, devices):
        self.batcher, self.metrics = opened(
            *[self.device] * devices,
            max_batch=self.max_batch,
            queue_limit=self.limit,
            dispatch=Dispatch([Seat() for _ in range(devices)]),
            forecast=Forecast(self.time.now),
        )
        self.free = devices
        self.serving = asyncio.create_task(self.batcher.run())

    # What the device sees.

    async def device(self, items: Sequence[Request]):
        assert len(items) <= self.max_batch
        now = self.time.now()
        assert all(not request.left and request.deadline > now for request in items)
        again = [request for request in items if request in self.failed_parts]
        if again:  # part of a batch that failed
            assert again == list(items)
            self.failed_parts = [one for one in self.failed_parts if one not in items]
        else:
            order = self.in_order()
            assert list(items) == [one for one in order if one in items]
            # Nobody makes way who has not waited for half of its time.
            before = order[: order.index(items[-1])]
            made_way = [one for one in before if one not in items]
            late = [one for one in made_way if one.deadline - now < (one.deadline - one.since) / 2]
            assert self.impatient or made_way == late
            # A batch is smaller than it could be only for the sake of somebody who cannot wait.
            fits = len(items) in (self.max_batch, len(self.waiting))
            assert fits or self.impatient or any(one.deadline < inf for one in order)
            self.waiting = [one for one in self.waiting if one not in items]
        run = Run(items, asyncio.get_running_loop().create_future())
        self.running.append(run)
        for request in items:
            request.runs.append(run)
        await run.end
        return [2 * id(request) for request in items]

    def in_order(self) -> list[Request]:
        """Who waits, by whose turn it is: the upper class, but after those that are due."""
        alive = [one for one in self.waiting if one.deadline > self.time.now()]
        high = [one for one in alive if one.priority == "high"]
        low = [one for one in alive if one.priority == "low"]
        ordered = []
        while high or low:
            low_first = low and (not high or low[0].due < high[0].since)
            ordered.append((low if low_first else high).pop(0))
        return ordered

    # What callers and devices do.

    @rule(priorities=st.lists(PRIORITIES, min_size=1, max_size=6), patience=st.just(inf))
    def ask(self, priorities, patience):
        self.submit(priorities, patience)

    @rule(priorities=st.lists(PRIORITIES, min_size=1, max_size=3), patience=st.floats(0.01, 5.0))
    def ask_with_a_deadline(self, priorities, patience):
        self.submit(priorities, patience)

    def submit(self, priorities, patience):
        now = self.time.now()
        for priority in priorities:
            request = Request(priority, now, now + patience)
            self.requests.append(request)
            request.outcome = self.time.loop.create_task(self.answer(request, patience))
        self.settle()

    async def answer(self, request: Request, patience: float):
        held = [one.priority for one in self.waiting]
        full, kept = self.metrics.rejected["queue_full"], -(-self.limit // 4)
        before = full._value.get()
        # Who is in the queue and dead already holds a place until the queue turns to it.
        taken, taken_low = len(held), held.count("low")
        fits = taken < self.limit and (
            request.priority == "high" or not taken or taken_low < self.limit - kept
        )
        timeout_s = None if patience == inf else patience
        try:
            admission = self.batcher.admit(1, timeout_s, priority=request.priority)
        except Overloaded:
            request.deadline = -inf
            refused_full = full._value.get() > before
            assert refused_full is not fits
            assert refused_full or timeout_s is not None or self.impatient
            raise
        except Draining:
            request.deadline = -inf
            assert self.draining
            raise
        assert fits
        assert not self.draining
        with admission:
            assert admission.since == request.since
            assert (admission.due == request.since) is (request.priority == "high")
            request.due = admission.due
            self.waiting.append(request)
            try:
                served = await self.batcher.submit(request, admission, request.deadline)
            finally:
                if request in self.waiting:
                    self.waiting.remove(request)
        return served.result

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def one_that_waits_leaves(self, data):
        self.leave(data.draw(st.sampled_from(self.waiting)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def one_that_is_computed_leaves(self, data):
        run = data.draw(st.sampled_from(self.running))
        self.leave(data.draw(st.sampled_from(run.requests)))

    def leave(self, request: Request):
        if request.outcome.cancel():
            request.left = self.impatient = True
        self.settle()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fails=st.booleans())
    def a_batch_ends(self, data, fails):
        run = data.draw(st.sampled_from(self.running))
        self.running.remove(run)
        if fails:
            run.result = "failed"
            if len(run.requests) > 1:
                self.failed_parts += run.requests
            run.end.set_exception(RuntimeError("told to fail"))
        else:
            run.result = "worked"
            run.end.set_result(None)
        self.settle()

    @rule(seconds=st.floats(0.001, 3.0))
    def time_goes_on(self, seconds):
        self.time_passes(seconds)

    def time_passes(self, seconds):
        self.time.run(asyncio.sleep(seconds))
        self.settle()

    @precondition(lambda self: any(one.priority == "low" for one in self.waiting))
    @rule()
    def one_of_the_lower_class_comes_of_age(self):
        due = next(one.due for one in self.waiting if one.priority == "low")
        self.time_passes(max(0.0, due - self.time.now()) + 0.001)

    @rule()
    def the_queue_drains(self):
        self.batcher.begin_drain()
        self.draining = True
        self.settle()

    def settle(self):
        async def turns():
            for _ in range(12):
                await asyncio.sleep(0)

        self.time.run(turns())

    # What always holds.

    @invariant()
    def the_limits_hold(self):
        if not hasattr(self, "batcher"):
            return
        held = value(self.metrics.waiting)
        assert held == len(self.waiting) <= self.limit
        low = sum(one.priority == "low" for one in self.waiting)
        assert low <= max(1, self.limit - -(-self.limit // 4))
        assert value(self.metrics.running) == sum(len(run.requests) for run in self.running)
        # Nobody waits beside a device that is free.
        assert not self.waiting or len(self.running) == self.free

    def teardown(self):
        if not hasattr(self, "batcher"):
            return
        self.the_queue_drains()
        while self.running:
            run = self.running.pop()
            run.result = "worked"
            run.end.set_result(None)
            self.settle()
        assert self.serving.done()
        for request in self.requests:
            assert request.outcome.done()
            self.check(request)
        self.time.close()

    @staticmethod
    def check(request: Request):
        """Its one outcome is one that it can have."""
        last = request.runs[-1].result if request.runs else "none"
        if request.outcome.cancelled():
            assert request.left
            return
        match request.outcome.exception():
            case None:
                assert last == "worked"
                assert request.outcome.result() == 2 * id(request)
            case EngineFailed():
                assert last == "failed"
            case DeadlineExceeded():
                assert request.deadline < inf
            case refused:
                assert isinstance(refused, Overloaded | Draining)
                assert not request.runs


QueueModel.TestCase.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
test_the_queue_is_as_its_model = QueueModel.TestCase
