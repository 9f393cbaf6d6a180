"""Turns at the decoders, with threads that are held by events."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service.errors import Overloaded
from service.images.decoders import Decoders
from service.metrics.replica import Metrics

LARGE, SMALL, TINY = 50_000_000, 300_000, 3_000


def opened(threads=1, max_pixels=10 * LARGE):
    gauge = Metrics(CollectorRegistry()).pixels_in_flight
    return Decoders(ThreadPoolExecutor(threads), threads, max_pixels, gauge), gauge


class Held:
    """Work that is begun and not done before it is let go."""

    def __init__(self):
        self.begun = threading.Event()
        self.free = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.free.wait(30)


async def test_a_small_image_waits_for_the_one_in_hand_alone():
    order = []
    decoders, _ = opened()
    with decoders, decoders.request(6 * LARGE) as one, decoders.request(SMALL) as other:
        held = Held()
        hand = asyncio.create_task(one.run(LARGE, held))
        await asyncio.to_thread(held.begun.wait, 30)
        large = [
            asyncio.create_task(one.run(LARGE, lambda n=n: order.append(f"large {n}")))
            for n in range(5)
        ]
        await asyncio.sleep(0)
        small = asyncio.create_task(other.run(SMALL, lambda: order.append("small")))
        await asyncio.sleep(0)
        held.free.set()
        await asyncio.gather(hand, small, *large)
    assert order == ["small", *(f"large {n}" for n in range(5))]


async def test_a_large_image_has_its_turn_before_small_ones_that_come_long_after(monkeypatch):
    order = []
    decoders, _ = opened()
    now = [0.0]
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0], raising=False)
    with decoders, decoders.request(LARGE) as early:
        held = Held()
        hand = asyncio.create_task(decoders.run_now(held))
        await asyncio.to_thread(held.begun.wait, 30)
        large = asyncio.create_task(early.run(LARGE, lambda: order.append("large")))
        await asyncio.sleep(0)
        now[0] = 30.0
        with decoders.request(SMALL) as late:
            small = asyncio.create_task(late.run(SMALL, lambda: order.append("small")))
            await asyncio.sleep(0)
            held.free.set()
            await asyncio.gather(hand, large, small)
    assert order == ["large", "small"]


async def test_an_image_whose_caller_left_is_not_decoded():
    decoders, gauge = opened()
    decoded = []
    with decoders:
        held = Held()
        hand = asyncio.create_task(decoders.run_now(held))
        await asyncio.to_thread(held.begun.wait, 30)
        with decoders.request(2 * SMALL) as request:
            gone = asyncio.create_task(request.run(SMALL, lambda: decoded.append("gone")))
            stays = asyncio.create_task(request.run(SMALL, lambda: decoded.append("stays")))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait([gone])
            held.free.set()
            await asyncio.gather(hand, stays)
    assert decoded == ["stays"]
    assert gauge._value.get() == 0


async def test_the_lower_class_is_decoded_after_the_upper_one_until_it_is_of_age():
    order = []
    decoders, _ = opened()
    now = asyncio.get_running_loop().time()
    with (
        decoders,
        decoders.request(SMALL, "low", now + 60) as young,
        decoders.request(SMALL, "low", now - 60) as of_age,
        decoders.request(SMALL) as upper,
    ):
        held = Held()
        hand = asyncio.create_task(decoders.run_now(held))
        await asyncio.to_thread(held.begun.wait, 30)
        images = [
            asyncio.create_task(request.run(SMALL, partial(order.append, name)))
            for name, request in (("young", young), ("upper", upper), ("of age", of_age))
        ]
        await asyncio.sleep(0)
        held.free.set()
        await asyncio.gather(hand, *images)
    assert order == ["of age", "upper", "young"]


async def test_the_lower_class_leaves_pixels_to_the_upper_one():
    decoders, gauge = opened(max_pixels=4 * LARGE)
    with decoders, decoders.request(3 * LARGE, "low") as lower:
        with pytest.raises(Overloaded, match="pixels wait to be decoded"):
            decoders.request(1, "low")
        with decoders.request(LARGE):
            assert gauge._value.get() == 4 * LARGE
        await lower.run(LARGE, lambda: None)
        with decoders.request(LARGE, "low"):
            pass
    assert gauge._value.get() == 0


async def test_the_time_until_images_are_decoded_is_foretold_by_their_pixels():
    decoders, _ = opened(threads=2)
    assert decoders.wait_s(images=[LARGE]) == 0  # nothing was measured
    with decoders, decoders.request(LARGE) as request:
        await decoders.run_now(lambda: time.sleep(0.05))  # no image
        assert decoders.wait_s(images=[LARGE]) == 0
        await request.run(LARGE, lambda: time.sleep(0.01))
        alone = decoders.wait_s(images=[LARGE])
        assert alone >= 0.01
        assert decoders.wait_s(images=[LARGE // 2]) == pytest.approx(alone / 2)
        with decoders.request(3 * LARGE), decoders.request(4 * LARGE, "low"):
            assert decoders.wait_s(images=[LARGE]) == pytest.approx(2 * alone)  # two threads
            assert decoders.wait_s("low", [LARGE]) == pytest.approx(4 * alone)
            assert decoders.wait_s() == pytest.approx(1.5 * alone)


async def test_pixels_beyond_the_limit_are_refused_and_come_back():
    decoders, gauge = opened(max_pixels=LARGE)
    with decoders:
        with decoders.request(LARGE) as request:
            assert gauge._value.get() == LARGE
            with pytest.raises(Overloaded, match="pixels wait to be decoded"):
                decoders.request(SMALL)
            await request.run(LARGE, lambda: None)
            with decoders.request(SMALL):  # what is decoded waits no more
                pass
        # A request is within its own limit; alone it is always taken.
        with decoders.request(2 * LARGE):
            pass
    assert gauge._value.get() == 0


async def test_a_failure_is_that_of_the_image():
    decoders, _ = opened()

    def fail():
        raise ValueError("no image")

    with decoders, decoders.request(2) as request:
        failing, working = request.run(1, fail), request.run(1, lambda: "pixels")
        with pytest.raises(ValueError, match="no image"):
            await failing
        assert await working == "pixels"


async def test_a_few_tiny_images_share_a_thread_and_a_larger_one_has_its_own():
    decoders, _ = opened(threads=4)
    with decoders, decoders.request(LARGE) as request:
        held, begun = Held(), threading.Event()
        images = [asyncio.create_task(request.run(TINY, held))]
        images += [asyncio.create_task(request.run(TINY, lambda: None)) for _ in range(9)]
        await asyncio.sleep(0)
        assert len(decoders.pool._threads) == 1
        images.append(asyncio.create_task(request.run(SMALL, begun.set)))
        assert await asyncio.to_thread(begun.wait, 30)
        assert len(decoders.pool._threads) == 2
        held.free.set()
        await asyncio.gather(*images)


@pytest.mark.parametrize(("pixels", "count"), [(SMALL, 4), (TINY, 350)])
async def test_many_images_have_all_threads(pixels, count):
    decoders, _ = opened(threads=4)
    # Twice: no thread is counted as awake that is not.
    for _ in range(2):
        together = threading.Barrier(4)
        with decoders.request(LARGE) as request:
            first = [request.run(pixels, partial(together.wait, 30)) for _ in range(4)]
            rest = [request.run(pixels, lambda: None) for _ in range(count - 4)]
            await asyncio.gather(*first, *rest)
    decoders.pool.shutdown()


@given(st.lists(st.tuples(st.integers(0, LARGE), st.booleans()), max_size=30), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_every_image_is_decoded_once_or_its_caller_left(images, threads):
    async def scenario():
        decoders, gauge = opened(threads, max_pixels=100 * LARGE)
        decoded = []
        with decoders:
            with decoders.request(sum(pixels for pixels, _ in images)) as request:
                tasks = [
                    asyncio.create_task(request.run(pixels, lambda n=n: decoded.append(n) or n))
                    for n, (pixels, _) in enumerate(images)
                ]
                await asyncio.sleep(0)
                for task, (_, leaves) in zip(tasks, images, strict=True):
                    if leaves:
                        task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert gauge._value.get() == 0
        assert len(decoded) == len(set(decoded))
        for n, (end, (_, leaves)) in enumerate(zip(ends, images, strict=True)):
            assert leaves or (end == n and n in decoded)

    asyncio.run(scenario())
