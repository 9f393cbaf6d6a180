"""Places in a queue that several processes share are never more than there are."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.priority import Priority, fits
from service.processes.board import Board, Extent, SharedPlaces, class_of
from tests.server import ROOT

ROWS, WORKERS, MODELS = 4, 2, 2
CLASSES: tuple[Priority, ...] = ("high", "low")


class Sharing(RuleBasedStateMachine):
    """Front ends take places, give them back, die and come back; workers take their items."""

    @initialize(limit=st.integers(1, 9))
    def begin(self, limit):
        self.board = Board.create(Extent(ROWS, WORKERS, MODELS))
        self.limit = limit
        self.held: Counter[tuple[int, int, Priority]] = Counter()
        self.places = [
            [SharedPlaces(self.board, row, model, limit) for model in range(MODELS)]
            for row in range(ROWS)
        ]
        for row in range(ROWS):
            self.board.enter(row)

    def teardown(self):
        if hasattr(self, "board"):
            os.close(self.board.descriptor)

    def of_model(self, model):
        """Places held for requests of the upper and of the lower class."""
        return tuple(sum(self.held[row, model, c] for row in range(ROWS)) for c in CLASSES)

    @rule(
        row=st.integers(0, ROWS - 1),
        model=st.integers(0, MODELS - 1),
        n=st.integers(1, 4),
        priority=st.sampled_from(CLASSES),
    )
    def take(self, row, model, n, priority):
        high, low = self.of_model(model)
        given = self.places[row][model].take(n, priority)
        assert given == fits(n, priority, held=high + low, held_low=low, limit=self.limit)
        if priority == "high":
            assert given == (high + low + n <= self.limit)
        if given:
            self.held[row, model, priority] += n

    def one_who_holds(self, data):
        return data.draw(st.sampled_from(sorted(key for key, n in self.held.items() if n)))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def give_back(self, data):
        row, model, priority = held = self.one_who_holds(data)
        n = data.draw(st.integers(1, self.held[held]))
        self.places[row][model].give_back(n, priority)
        self.held[held] -= n

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), worker=st.integers(0, WORKERS - 1))
    def leave_for_the_device(self, data, worker):
        row, model, priority = held = self.one_who_holds(data)
        self.board.taken[row, model, worker, class_of(priority)] += 1
        self.held[held] -= 1

    @rule(row=st.integers(0, ROWS - 1))
    def die_and_come_back(self, row):
        self.board.alive[row] = 0
        for model in range(MODELS):
            for priority in CLASSES:
                self.held[row, model, priority] = 0
            assert self.board.count(model).held == sum(self.of_model(model))
        self.board.enter(row)

    @invariant()
    def counts(self):
        if hasattr(self, "board"):
            for model in range(MODELS):
                high, low = self.of_model(model)
                assert self.board.count(model)[:2] == (high + low, low)
                assert high + low <= self.limit


Sharing.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_places_are_given_as_long_as_there_are_some_whoever_holds_them = Sharing.TestCase


# Takes and gives back as fast as it can, and looks whether there are more than there may be.
GREEDY = """
import sys, time
from service.processes.board import Board, Extent, SharedPlaces, class_of
descriptor, row, limit, rounds = map(int, sys.argv[1:])
board = Board(descriptor, Extent(8, 1, 1))
places = SharedPlaces(board, row, 0, limit)
took = 0
for turn in range(rounds):
    wanted, priority = 1 + (row + turn) % 3, "low" if turn % 3 else "high"
    if places.take(wanted, priority):
        took += wanted
        assert board.count(0).held <= limit, board.count(0)
        if turn % 2:
            places.give_back(wanted, priority)
        else:  # one after the other leave for the device
            for _ in range(wanted):
                board.taken[row, 0, 0, class_of(priority)] += 1
print(took)
"""


def test_processes_that_grab_at_once_never_hold_more_than_there_is():
    board = Board.create(Extent(8, 1, 1))
    processes = []
    for row in range(4):
        board.enter(row)
        arguments = [str(n) for n in (board.descriptor, row, 4, 4000)]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", GREEDY, *arguments],
                cwd=ROOT,
                pass_fds=[board.descriptor],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    took = [int(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert all(took)
    np.testing.assert_array_equal(board.admitted[:4, 0].sum(-1), took)
    assert board.count(0).held == 0
    os.close(board.descriptor)


HOLDER = """
import sys, time
from service.processes.board import Board, Extent, SharedPlaces, _Lock
descriptor = int(sys.argv[1])
board = Board(descriptor, Extent(8, 1, 1))
SharedPlaces(board, 1, 0, 4).take(3, "high")
with _Lock(descriptor, 0):
    print("locked", flush=True)
    time.sleep(1000)
"""


def test_a_process_that_dies_or_stops_in_the_middle_of_an_admission_does_not_stop_the_others():
    board = Board.create(Extent(8, 1, 1))
    board.enter(0)
    board.enter(1)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(board.descriptor)],
        cwd=ROOT,
        pass_fds=[board.descriptor],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        ours = SharedPlaces(board, 0, 0, 4)
        os.kill(process.pid, signal.SIGSTOP)
        began = time.process_time()
        assert not ours.take(1, "high")  # it does not wait for one that may never come back
        assert time.process_time() - began < 5
        process.kill()
    assert not ours.take(2, "high")  # nobody has said yet that it is gone
    board.alive[1] = 0
    assert ours.take(4, "high")
    os.close(board.descriptor)
