"""Who is next of two classes, and how a crowd of one of them meets the other."""

import asyncio
from math import inf
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.admission import LocalPlaces
from service.batching.dispatch import Dispatch
from service.batching.forecast import Forecast
from service.batching.waiting import Turns, Waiting
from service.errors import Overloaded
from tests.service.batching.test_batcher import Seat, opened
from tests.virtual_time import in_virtual_time

PRIORITIES = st.sampled_from(["high", "low"])


@given(st.lists(st.tuples(PRIORITIES, st.floats(0, 10)), max_size=30))
def test_each_class_is_in_order_of_arrival_and_nobody_waits_for_ever(came):
    waiting = Waiting()
    for number, (priority, later) in enumerate(came):
        due = number + (later if priority == "low" else 0)
        waiting.add((number, priority, due), priority, due)
    ordered = list(waiting)
    assert sorted(ordered) == [
        (n, p, n + (d if p == "low" else 0)) for n, (p, d) in enumerate(came)
    ]
    for priority in ("high", "low"):
        of_class = [one for one in ordered if one[1] == priority]
        assert of_class == sorted(of_class)
        assert waiting.holds(priority) is bool(of_class)
    low = [one for one in ordered if one[1] == "low"]
    for index, (number, priority, _) in enumerate(ordered):
        if priority == "high":
            # Before it come those of the lower class alone that were due when it came.
            before = low[: sum(one in ordered[:index] for one in low)]
            assert all(due <= number for *_, due in before)
            after = low[len(before) :]
            assert not after or after[0][2] >= number
    for one in ordered[::2]:
        assert waiting.discard(one)
        assert not waiting.discard(one)
    assert sorted(waiting) == sorted(ordered[1::2])
    assert len(waiting) == len(ordered[1::2])


@given(
    st.lists(st.tuples(st.sampled_from("aaarc"), PRIORITIES), max_size=40),
    st.integers(1, 4),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_turns_are_bounded_for_each_class_and_none_is_lost(steps, number, kept):
    async def scenario():
        turns, tasks, held = Turns(number, kept), [], []

        async def wait(priority):
            await turns.acquire(priority, asyncio.get_running_loop().time())
            held.append(priority)

        for step, priority in steps:
            if step == "a":
                tasks.append(asyncio.create_task(wait(priority)))
            elif step == "r" and held:
                held.pop()
                turns.release()
            elif step == "c" and tasks:
                tasks.pop().cancel()  # perhaps just when it gets its turn
            if step != "r":  # a turn that is given is not taken at once
                await asyncio.sleep(0)
            assert len(held) <= number + kept
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waits = [task for task in tasks if not task.done()]
        assert not waits or len(held) >= number
        while held:
            held.pop()
            turns.release()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert all(task.done() for task in tasks)
        for _ in range(number):
            await asyncio.wait_for(turns.acquire("low", 0.0), 1)
        for _ in range(kept):
            await asyncio.wait_for(turns.acquire("high", 0.0), 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(turns.acquire("high", 0.0), 0.001)

    asyncio.run(scenario())


@given(st.integers(1, 300), st.lists(st.tuples(PRIORITIES, st.integers(1, 40)), max_size=40))
def test_the_lower_class_leaves_a_quarter_and_is_not_shut_out(limit, requests):
    places = LocalPlaces(limit)
    held = {"high": 0, "low": 0}
    for priority, wanted in requests:
        taken = places.take(wanted, priority)
        total = sum(held.values())
        if priority == "high":
            assert taken is (total + wanted <= limit)
        elif total:
            assert taken is (total + wanted <= limit and 4 * (held["low"] + wanted) <= 3 * limit)
        else:  # or a request with many images might never be taken
            assert taken is (wanted <= limit)
        held[priority] += wanted * taken
        assert places.count()[:2] == (sum(held.values()), held["low"])


def flooded(crowd, other, *, answers, queue_limit=256):
    """Times until answers, by class, of one caller of the other class beside a crowd.

    A batch takes 20 ms in virtual time; everybody asks again as soon as the answer is there.
    """

    async def scenario():
        loop = asyncio.get_running_loop()
        taken = {"high": [], "low": []}

        async def device(items):
            await asyncio.sleep(0.02)
            return items

        batcher, _ = opened(
            device,
            max_batch=8,
            queue_limit=queue_limit,
            dispatch=Dispatch([Seat()]),
            forecast=Forecast(loop.time),
        )

        async def ask(priority):
            since = loop.time()
            with batcher.admit(1, priority=priority) as admission:
                async with batcher.ahead(admission, inf) as turn:
                    await turn.submit(1, admission, inf)
            taken[priority].append(loop.time() - since)

        async def always(priority):
            while True:
                try:
                    await ask(priority)
                except Overloaded:
                    assert priority == crowd
                    await asyncio.sleep(0.01)

        run = asyncio.create_task(batcher.run())
        everybody = [asyncio.create_task(always(crowd)) for _ in range(64)]
        await asyncio.sleep(1)
        for _ in range(answers):
            await ask(other)
        for task in [run, *everybody]:
            task.cancel()
        return taken

    return in_virtual_time(scenario())


@pytest.mark.parametrize("queue_limit", [256, 32])
def test_a_crowd_of_the_lower_class_makes_the_upper_one_wait_for_two_batches(queue_limit):
    taken = flooded("low", "high", answers=100, queue_limit=queue_limit)
    assert max(taken["high"]) < 3 * 0.02 + 1e-6  # and its own
    assert mean(taken["high"]) < 0.5 * mean(taken["low"])
    assert len(taken["low"]) > 0.8 * len(taken["high"]) * 8


def test_a_crowd_of_the_upper_class_makes_the_lower_one_wait_for_a_bounded_time():
    taken = flooded("high", "low", answers=10)
    # What was ahead of it would have taken 0.18 s: it counts as an upper one after a second.
    assert min(taken["low"]) > 1.0
    assert max(taken["low"]) < 1.0 + 2 * 64 / 8 * 0.02
