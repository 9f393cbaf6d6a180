"""Places in a queue that several processes share are never more than there are."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.processes.board import Board, Extent, SharedPlaces, WorkerState
from tests.server import ROOT

ROWS, WORKERS, MODELS = 4, 2, 2


class Sharing(RuleBasedStateMachine):
    """Front ends take places, give them back, die and come back; workers take their items."""

    @initialize(limit=st.integers(1, 9))
    def begin(self, limit):
        self.board = Board.create(Extent(ROWS, WORKERS, MODELS))
        self.limit = limit
        self.held: Counter[tuple[int, int]] = Counter()
        self.places = [
            [SharedPlaces(self.board, row, model, limit) for model in range(MODELS)]
            for row in range(ROWS)
        ]
        for row in range(ROWS):
            self.board.enter(row)

    def teardown(self):
        if hasattr(self, "board"):
            os.close(self.board.descriptor)

    @rule(row=st.integers(0, ROWS - 1), model=st.integers(0, MODELS - 1), n=st.integers(1, 4))
    def take(self, row, model, n):
        before = self.of_model(model)
        given = self.places[row][model].take(n)
        assert given == (before + n <= self.limit)
        if given:
            self.held[row, model] += n

    def of_model(self, model):
        return sum(self.held[row, model] for row in range(ROWS))

    def one_who_holds(self, data):
        return data.draw(st.sampled_from(sorted(key for key, n in self.held.items() if n)))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def give_back(self, data):
        row, model = self.one_who_holds(data)
        n = data.draw(st.integers(1, self.held[row, model]))
        self.places[row][model].give_back(n)
        self.held[row, model] -= n

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), worker=st.integers(0, WORKERS - 1))
    def leave_for_the_device(self, data, worker):
        row, model = self.one_who_holds(data)
        self.board.taken[row, model, worker] += 1
        self.held[row, model] -= 1

    @rule(row=st.integers(0, ROWS - 1))
    def die_and_come_back(self, row):
        self.board.alive[row] = 0
        for model in range(MODELS):
            self.held[row, model] = 0
            assert self.board.held(model) == self.of_model(model)
        self.board.enter(row)

    @invariant()
    def counts(self):
        if hasattr(self, "board"):
            for model in range(MODELS):
                held = self.of_model(model)
                assert held == self.board.held(model) == self.places[0][model].held <= self.limit


Sharing.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_places_are_given_as_long_as_there_are_some_whoever_holds_them = Sharing.TestCase


# Takes and gives back as fast as it can, and looks whether there are more than there may be.
GREEDY = """
import sys, time
from service.processes.board import Board, Extent, SharedPlaces
descriptor, row, limit, rounds = map(int, sys.argv[1:])
board = Board(descriptor, Extent(8, 1, 1))
places = SharedPlaces(board, row, 0, limit)
took = 0
for turn in range(rounds):
    wanted = 1 + (row + turn) % 3
    if places.take(wanted):
        took += wanted
        assert board.held(0) <= limit, board.held(0)
        if turn % 2:
            places.give_back(wanted)
        else:  # one after the other leave for the device
            for _ in range(wanted):
                board.taken[row, 0, 0] += 1
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
    np.testing.assert_array_equal(board.admitted[:4, 0], took)
    assert board.held(0) == 0
    os.close(board.descriptor)


HOLDER = """
import sys, time
from service.processes.board import Board, Extent, SharedPlaces, _Lock
descriptor = int(sys.argv[1])
board = Board(descriptor, Extent(8, 1, 1))
SharedPlaces(board, 1, 0, 4).take(3)
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
        assert not ours.take(1)  # it does not wait for one that may never come back
        assert time.process_time() - began < 5
        process.kill()
    assert not ours.take(2)  # nobody has said yet that it is gone
    board.alive[1] = 0
    assert ours.take(4)
    os.close(board.descriptor)


@pytest.mark.parametrize("seconds", [[0.5, 0.5], [0.0, 0.25], [0.0, 0.0]])
def test_workers_that_run_a_model_add_up_to_one_rate(seconds):
    board = Board.create(Extent(1, 2, 1))
    board.serving[:] = 1
    board.state[:] = WorkerState.READY
    board.seconds_per_item[:, 0] = seconds
    assert board.rate(0) == {(0.5, 0.5): 0.25, (0.0, 0.25): 0.25, (0.0, 0.0): 0}[tuple(seconds)]
    board.state[1] = WorkerState.DOWN
    assert board.rate(0) == seconds[0]
    os.close(board.descriptor)
