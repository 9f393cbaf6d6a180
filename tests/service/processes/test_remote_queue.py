"""Every image has one outcome, and every place and slot comes back, whatever becomes of workers.

Both ends of the channels are in one process here, so that a rule can have them end anywhere.
"""

import asyncio
import os
import socket
from collections import Counter
from contextlib import suppress
from time import monotonic

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service.batching.batcher import Batcher
from service.batching.dispatch import Dispatch
from service.errors import DeadlineExceeded, EngineFailed, EngineUnavailable, Overloaded, WorkerLost
from service.metrics.replica import Metrics
from service.priority import Priority
from service.processes.arena import Arena
from service.processes.board import Board, Extent, WorkerPlaces, WorkerState
from service.processes.channel import pair
from service.processes.client import Client
from service.processes.messages import Opened
from service.processes.remote_queue import RemoteQueue, Workers
from tests.service.batching.test_batcher import Runner, Seat

WORKERS, AHEAD, KEPT, SLOT_BYTES = 2, 5, 2, 64
FAR = 1e9  # loop time, seconds


def counted(queue_limit):
    return Metrics(CollectorRegistry()).add_model("m", "1", "classify", queue_limit, ["cpu", "cpu"])


async def turns(count=12):
    """Let the event loop turn, until what was sent has come."""
    for _ in range(count):
        await asyncio.sleep(0)


class Server:
    """A front end and its workers, each of which may be there or not."""

    def __init__(self, max_batch, limit):
        self.board = Board.create(Extent(1, WORKERS, 1))
        self.board.enter(0)
        self.memory = os.memfd_create("arena")
        arena = Arena(self.memory)
        slots = arena.open_slots(AHEAD + KEPT, SLOT_BYTES)
        self.workers = Workers(self.board, 0, arena)
        self.queue = RemoteQueue(
            self.workers,
            self.board,
            0,
            0,
            queue_limit=limit,
            arena=arena,
            slots=slots,
            ahead=AHEAD,
            kept=KEPT,
            metrics=counted(limit),
        )
        self.queue.open()
        self.max_batch = max_batch
        self.running = {}
        self.computed = Counter()

    async def come(self, index):
        """Start a worker."""
        releases = []

        async def device(items):
            release = asyncio.get_running_loop().create_future()
            releases.append(release)
            await release
            self.computed.update(item["number"] for item in items)
            return [{"twice": 2 * item["pixels"].astype(int)} for item in items]

        batcher = Batcher(
            [Runner(device, self.max_batch)],
            max_batch=self.max_batch,
            places=WorkerPlaces(self.board, index, 0),
            metrics=counted(0),
            dispatch=Dispatch([Seat()]),
        )
        batcher.open()
        ours, theirs = pair()
        channel = await self.workers.connect(index, ours)
        channel.send(Opened(0))
        ready = asyncio.Event()
        ready.set()
        end = theirs.dup()
        client = Client(0, os.dup(self.memory), self.board, index, {0: batcher})
        await client.open(theirs.detach(), ready)
        self.board.state[index], self.board.serving[index, 0] = WorkerState.READY, 1
        self.running[index] = (asyncio.create_task(batcher.run()), end, releases)

    async def die(self, index):
        """End a worker; what it has sent before arrives, and nothing that it has not."""
        await turns()
        run, end, _ = self.running.pop(index)
        run.cancel()
        end.shutdown(socket.SHUT_RDWR)
        end.close()
        with suppress(asyncio.CancelledError):
            await run
        await turns()
        board = self.board
        board.state[index] = WorkerState.DOWN
        board.serving[index] = board.running[index] = 0
        board.back_at[index] = monotonic() + 1

    def release(self, index, error=None):
        """Let the device of a worker do the batch that it has."""
        if index in self.running and self.running[index][2]:
            release = self.running[index][2].pop(0)
            if error is None:
                release.set_result(None)
            else:
                release.set_exception(error)

    async def ask(self, number, deadline=FAR):
        def decoded(empty):
            pixels = empty((3, number % 30 + 1))  # the largest have no room in their slot
            pixels[:] = number
            return pixels

        priority: Priority = "low" if number % 3 else "high"
        with self.queue.admit(1, priority=priority) as admission:
            async with self.queue.ahead(admission, deadline) as turn:
                item = {"number": number, "pixels": turn.fill(decoded)}
                return (await turn.submit(item, admission, deadline, 0.0)).result["twice"]

    async def all_slots_are_free(self):
        everybody = asyncio.Barrier(AHEAD + KEPT)

        async def wait():
            with self.queue.admit(0) as admission:
                async with self.queue.ahead(admission, FAR):
                    await everybody.wait()

        async with asyncio.timeout(5):
            await asyncio.gather(*(wait() for _ in range(AHEAD + KEPT)))

    async def end(self):
        for index in list(self.running):
            await self.die(index)
        os.close(self.memory)
        os.close(self.board.descriptor)


KINDS = ["submit", "submit", "submit", "cancel", "expire", "device", "fail", "die", "come", "look"]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99)), min_size=5, max_size=50)


class Steps:
    """What happens to a server, one step after another.

    Attributes:
        asked: the images, each with the task of its caller.
    """

    def __init__(self, server):
        self.server = server
        self.asked = {}

    async def take(self, number, step, chosen):
        server, index = self.server, chosen % WORKERS
        there = index in server.running
        if step in ("submit", "expire"):
            deadline = FAR if step == "submit" else asyncio.get_running_loop().time()
            self.asked[number] = asyncio.create_task(server.ask(number, deadline))
        elif step == "cancel" and self.asked:
            list(self.asked.values())[chosen % len(self.asked)].cancel()
        elif step in ("device", "fail"):
            server.release(index, RuntimeError("device") if step == "fail" else None)
        elif step == "die" and there:
            await server.die(index)
        elif step == "come" and not there:
            await server.come(index)
        elif step == "look":
            server.workers.look_after_waiting()
        await turns(chosen % 7)

    async def finish(self):
        """Let all workers answer everything."""
        server = self.server
        for index in set(range(WORKERS)) - server.running.keys():
            await server.come(index)
        async with asyncio.timeout(30):
            # What was left by its caller is computed for nobody.
            while (
                not all(map(asyncio.Task.done, self.asked.values())) or server.board.loads().any()
            ):
                server.workers.look_after_waiting()
                for index in range(WORKERS):
                    server.release(index)
                await turns()
        return await asyncio.gather(*self.asked.values(), return_exceptions=True)


ERRORS = (DeadlineExceeded, EngineFailed, EngineUnavailable, Overloaded, asyncio.CancelledError)


@given(STEPS, st.integers(1, 4), st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_every_image_has_one_outcome_and_every_place_comes_back(steps, max_batch, limit):
    async def scenario():
        server = Server(max_batch, limit)
        happening = Steps(server)
        for index in range(WORKERS):
            await server.come(index)
        await turns()
        for number, (step, chosen) in enumerate(steps):
            await happening.take(number, step, chosen)
            assert 0 <= server.queue.places.count().held <= limit
        outcomes = await happening.finish()
        for number, outcome in zip(happening.asked, outcomes, strict=True):
            if isinstance(outcome, np.ndarray):
                assert (outcome == 2 * number).all()
                assert outcome.shape == (3, number % 30 + 1)
                assert server.computed[number] == 1
            else:
                assert isinstance(outcome, ERRORS), outcome
        assert all(times == 1 for times in server.computed.values())
        board = server.board
        given_back = board.returned[0] + board.taken[0].sum(1)
        np.testing.assert_array_equal(board.admitted[0], given_back)
        assert not board.running.any()
        await server.all_slots_are_free()
        await server.end()

    asyncio.run(scenario())


async def test_a_worker_that_ends_before_it_counts_what_it_took_keeps_no_place():
    server = Server(max_batch=1, limit=4)
    await server.come(0)
    with pytest.raises(WorkerLost):  # this front end has not heard of it yet
        server.queue.admit(1)
    await turns()
    asking = asyncio.create_task(server.ask(0))
    await turns(40)
    assert server.queue.places.count() == (0, 0, 1)
    server.board.taken[0, 0, 0, 0] -= 1  # as it is for a moment after the mark in the arena
    await server.die(0)
    with pytest.raises(EngineUnavailable):
        await asking
    assert server.queue.places.count() == (0, 0, 0)
    await server.come(0)
    await turns()
    await server.all_slots_are_free()
    await server.end()
