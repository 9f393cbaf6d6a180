"""Batches that have a part of the cores of a device, beside each other."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.dispatch import Dispatch
from service.batching.peak import Peak
from service.share import Share
from tests.service.batching.test_batcher import Runner, Seat, opened, submit, value
from tests.virtual_time import in_virtual_time


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 9)), min_size=1), st.floats(0, 5))
def test_the_most_of_late_is_that_of_all_that_was_noted_of_late(notes, window):
    peak, now, noted = Peak(), 0.0, []
    assert peak.most(now) == 0
    for passed, number in notes:
        now += passed
        peak.note(number, now)
        noted.append((now, number))
        assert peak.most(now - window) == max(one for at, one in noted if at >= now - window)
    assert peak.most(now + 1) == noted[-1][1]


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(1, 8), st.booleans(), st.integers(0, 2)), min_size=1),
)
@settings(deadline=None)
def test_cores_are_given_once_in_order_and_none_stays_idle_that_the_next_wants(cores, steps):
    """Steps: cores that a batch wants; whether it is full; how many leave after it came."""

    async def scenario():
        dispatch = Dispatch([Seat(cores=cores)])
        held, given, asking = [], [], []

        def free():
            return cores - sum(place.share.cores for place in held)

        async def ask(number, wanted, full):
            place = await dispatch.place(lambda: full, lambda _, __: Share(wanted, 1))
            given.append(number)
            held.append(place)
            assert place.beside == max(0, free()) // wanted

        for number, (wanted, full, leaving) in enumerate(steps):
            asked = min(wanted, cores)
            asking.append((asked, asyncio.create_task(ask(number, asked, full))))
            for _ in range(leaving + 1):
                for _ in range(3):
                    await asyncio.sleep(0)
                assert free() >= 0
                waiting = [wanted for wanted, task in asking if not task.done()]
                assert not waiting or waiting[0] > free()
                if leaving and held:
                    with held.pop(0):
                        pass
        for _, task in asking:
            while not task.done():
                if held:
                    with held.pop(0):
                        pass
                await asyncio.sleep(0)
        assert given == list(range(len(steps)))

    asyncio.run(scenario())


def test_a_full_batch_goes_ahead_of_nothing_but_a_whole_one():
    async def scenario():
        dispatch = Dispatch([Seat(depth=2, cores=2)])

        async def place(cores):
            return await asyncio.wait_for(
                dispatch.place(lambda: True, lambda _, __: Share(cores, 1)), 0.01
            )

        with await place(2) as first, await place(2) as ahead:
            assert (first.part, ahead.part) == (1.0, 1.0)
            with pytest.raises(TimeoutError):
                await place(2)
        with await place(1) as part:
            assert part.part == 0.5
            with pytest.raises(TimeoutError):
                await place(2)  # it would have a core that another batch has
            with await place(1) as other:
                assert other.beside == 0

    asyncio.run(scenario())


async def unchanged(items: Sequence[int]) -> Sequence[int]:
    return items


class Cores(Runner):
    """A device of some cores; so many of them compute an image in its share of a second."""

    def __init__(self, cores: int, max_batch: int) -> None:
        super().__init__(unchanged, max_batch)
        self.cores = cores
        self.batches: list[tuple[int, int]] = []  # images and cores of each
        self.busy = 0

    def share(self, in_flight: int, free: int) -> Share:
        part = max(1, min(self.cores // max(1, in_flight), free))
        return Share(part, self.max_batch)

    async def run_batch(self, batch: Sequence[int], cores: int) -> Sequence[int]:
        self.batches.append((len(batch), cores))
        self.busy += cores
        assert self.busy <= self.cores
        await asyncio.sleep(len(batch) / cores)
        self.busy -= cores
        return await self.work(batch)


def served(runner: Cores):
    """A batcher over that device; it has learned that an image takes a second."""
    batcher, metrics = opened(
        runner, max_batch=runner.max_batch, dispatch=Dispatch([Seat(cores=runner.cores)])
    )
    batcher.forecast.batch_ended(1, 1.0, 1.0, crowded=False)
    return batcher, metrics


async def closed_loop(batcher, callers, rounds):
    async def caller():
        for _ in range(rounds):
            await submit(batcher, 1)

    run = asyncio.create_task(batcher.run())
    await asyncio.gather(*(caller() for _ in range(callers)))
    run.cancel()


def test_a_single_caller_has_all_cores_for_each_image():
    runner = Cores(4, 8)
    batcher, _ = served(runner)
    in_virtual_time(closed_loop(batcher, 1, 5))
    assert runner.batches == [(1, 4)] * 5


def test_callers_share_the_cores_and_none_waits_for_another():
    runner = Cores(4, 8)
    batcher, metrics = served(runner)
    in_virtual_time(closed_loop(batcher, 4, 10))
    # The first came alone, as far as was known.
    assert {(1, 1)} == set(runner.batches[4:])
    assert value(metrics.running) == value(metrics.waiting) == 0


def test_of_two_callers_neither_is_taken_for_alone_when_the_other_is_just_answered():
    runner = Cores(2, 8)
    batcher, _ = served(runner)

    async def caller(pause_s):
        for _ in range(10):
            await submit(batcher, 1)
            await asyncio.sleep(pause_s)

    async def both():
        run = asyncio.create_task(batcher.run())
        await asyncio.gather(caller(0.1), caller(0.2))
        run.cancel()

    in_virtual_time(both())
    assert {(1, 1)} == set(runner.batches[1:16])


def test_what_waits_is_dealt_to_the_cores_that_are_free():
    runner = Cores(2, 8)
    batcher, _ = served(runner)

    async def burst():
        answers = [asyncio.create_task(submit(batcher, 1)) for _ in range(7)]
        await asyncio.sleep(0)
        run = asyncio.create_task(batcher.run())
        await asyncio.gather(*answers)
        run.cancel()

    in_virtual_time(burst())
    assert runner.batches == [(4, 1), (3, 1)]
