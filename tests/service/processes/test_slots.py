"""Slots of versions come and go in one arena, which both processes see."""

import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.processes.arena import TAKEN, Arena, Slots


@pytest.fixture
def descriptor() -> Iterator[int]:
    memory = os.memfd_create("arena")
    yield memory
    os.close(memory)


def all_of(slots: Slots) -> list[Any]:
    taken = [slots.take() for _ in range(slots.count)]
    for slot in taken:
        slots.give_back(slot)
    return taken


class Versions(RuleBasedStateMachine):
    """Versions of any size come and go; each slot keeps what was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = os.memfd_create("arena")
        self.ours, self.theirs = Arena(self.memory), Arena(self.memory)
        self.open: dict[int, tuple[Slots, list[Any]]] = {}
        self.count = 0

    @rule(count=st.integers(1, 9), least=st.integers(1, 5 * mmap.PAGESIZE))
    def version_comes(self, count: int, least: int) -> None:
        slots = self.ours.open_slots(count, least)
        self.count += 1
        self.open[self.count] = slots, all_of(slots)
        for slot in self.open[self.count][1]:
            assert slot.size >= least
            self.ours.array(slot, (slot.size,))[:] = (self.count + slot.number) % 251
            self.ours.taken[slot.number] = self.count % 2

    @rule(data=st.data())
    def version_goes(self, data: st.DataObject) -> None:
        if self.open:
            slots, _ = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
            self.ours.close_slots(slots)

    @invariant()
    def both_see_what_was_written(self) -> None:
        for version, (_, slots) in self.open.items():
            for slot in slots:
                seen = self.theirs.array(slot, (slot.size,))
                assert (seen == (version + slot.number) % 251).all()
                assert self.theirs.taken[slot.number] == version % 2
        numbers = [slot.number for _, slots in self.open.values() for slot in slots]
        assert len(set(numbers)) == len(numbers)

    def teardown(self) -> None:
        os.close(self.memory)


TestVersions = Versions.TestCase
TestVersions.settings = settings(deadline=None, max_examples=30, stateful_step_count=20)


def test_what_a_version_had_is_free_again_when_it_is_gone(descriptor):
    arena = Arena(descriptor)
    first = arena.open_slots(4, 1 << 20)
    for slot in all_of(first):
        arena.array(slot, (slot.size,))[:] = 1
    full = os.fstat(descriptor).st_blocks
    for _ in range(50):
        second = arena.open_slots(4, 1 << 20)
        for slot in all_of(second):
            arena.array(slot, (slot.size,))[:] = 2
        arena.close_slots(first)
        first = second
    assert os.fstat(descriptor).st_blocks <= full + 8
    assert os.fstat(descriptor).st_size < 32 << 20


def test_an_image_that_was_decoded_before_the_arena_grew_stays_where_it_is(descriptor):
    """The pixels lie in memory that was mapped earlier; they are neither moved nor overwritten."""
    ours, theirs = Arena(descriptor), Arena(descriptor)
    slot = ours.open_slots(1, 1 << 16).take()
    pixels = ours.array(slot, (100, 100, 3))
    pixels[:] = 7
    ours.open_slots(64, 1 << 20)
    parcel = ours.pack((np.arange(5.0), pixels), slot)
    ours.taken[slot.number] = TAKEN
    numbers, seen = theirs.unpack(parcel, copy=False)
    assert (seen == 7).all()
    assert (numbers == np.arange(5.0)).all()
    pixels[:] = 8  # the same memory
    assert (seen == 8).all()
    assert theirs.taken[slot.number] == TAKEN
