"""Objects with arrays cross from one process to another through a slot, whatever their form."""

import os
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from service.processes.arena import Arena, Slot

DTYPES = (np.uint8, np.int16, np.float32, np.float64, np.bool_)
SLOTS, SIZE = 3, 4096


def forms_of(array: np.ndarray) -> list[np.ndarray]:
    """The array as it is, and parts and views of it that are not contiguous."""
    forms = [array, array.T, np.asfortranarray(array)]
    if array.ndim:
        forms += [array[::2], array[::-1], array[..., :1], array[..., :0]]
    return forms


some_array = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=17))
).flatmap(lambda array: st.sampled_from(forms_of(array)))  # fmt: skip
plain = st.none() | st.integers() | st.text(max_size=9) | st.floats(allow_nan=False)
contents: st.SearchStrategy[Any] = st.recursive(
    plain | some_array,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours, theirs)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    else:
        assert one == other


@pytest.fixture(scope="module")
def ends():
    """The arena as both processes have it, and its slots."""
    descriptor = os.memfd_create("arena")
    ours, theirs = Arena(descriptor), Arena(descriptor)
    slots = ours.open_slots(SLOTS, SIZE)
    yield ours, theirs, [slots.take() for _ in range(SLOTS)]
    os.close(descriptor)


@settings(max_examples=100, deadline=None)
@given(content=contents, number=st.integers(0, SLOTS - 1), copy=st.booleans())
def test_what_is_packed_at_one_end_is_unpacked_at_the_other(ends, content, number, copy):
    ours, theirs, slots = ends
    parcel = pickle.loads(pickle.dumps(ours.pack(content, slots[number])))
    assert_same(theirs.unpack(parcel, copy=copy), content)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 3 * SIZE), max_size=5))
def test_what_has_no_room_in_the_slot_goes_another_way_and_no_neighbour_is_written(
    ends, data, sizes
):
    ours, theirs, slots = ends
    number = data.draw(st.integers(0, SLOTS - 1))
    for slot in slots:
        ours.array(slot, (slot.size,))[:] = 1 + slot.number
    content = [np.full(size, 200, np.uint8) for size in sizes]
    parcel = ours.pack(content, slots[number])
    assert_same(theirs.unpack(parcel, copy=False), content)
    for slot in slots:
        if slot is not slots[number]:
            assert (theirs.array(slot, (slot.size,)) == 1 + slot.number).all()
    inside = [buffer for buffer in parcel.buffers if not isinstance(buffer, bytes)]
    begins, ends_at = slots[number].offset, slots[number].offset + slots[number].size
    assert all(begins <= at and at + size <= ends_at for at, size in inside)
    spans = sorted((at, at + size) for at, size in inside if size)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize("shape", [(3,), (8, 9, 3), (SIZE,), (2, SIZE), (0, 4)])
def test_pixels_that_were_decoded_into_the_slot_are_not_copied(ends, shape):
    ours, theirs, (slot, *_) = ends
    pixels = ours.array(slot, shape)
    assert pixels.shape == shape
    pixels[:] = np.arange(pixels.size).reshape(shape) % 251
    parcel = ours.pack({"pixels": pixels}, slot)
    read = theirs.unpack(parcel, copy=False)["pixels"]
    np.testing.assert_array_equal(read, pixels)
    if 0 < pixels.size <= slot.size:
        assert parcel.buffers == ((slot.offset, pixels.size),)
        pixels.flat[0] = 252
        assert read.flat[0] == 252
        own = theirs.unpack(parcel, copy=True)["pixels"]
        pixels.flat[0] = 253
        assert own.flat[0] == 252
    else:
        assert all(isinstance(buffer, bytes) or not buffer[1] for buffer in parcel.buffers)


@settings(max_examples=50, deadline=None)
@given(models=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3 * SIZE)), max_size=4))
def test_slots_of_all_models_lie_apart_and_come_back(models):
    descriptor = os.memfd_create("arena")
    arena = Arena(descriptor)
    taken: list[Slot] = []
    for many, least in models:
        slots = arena.open_slots(many, least)
        own = [slots.take() for _ in range(many)]
        assert all(slot.size >= least for slot in own)
        with pytest.raises(IndexError):
            slots.take()
        for slot in own:
            slots.give_back(slot)
        assert {slots.take() for _ in range(many)} == set(own)
        taken += own
    os.close(descriptor)
    assert sorted(slot.number for slot in taken) == list(range(len(taken)))
    spans = sorted((slot.offset, slot.offset + slot.size) for slot in taken)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(len(arena.taken) <= start for start, _ in spans)


def test_a_free_slot_keeps_the_memory_of_a_common_image_alone():
    descriptor = os.memfd_create("arena")
    ours, theirs = Arena(descriptor), Arena(descriptor)
    slots = ours.open_slots(2, 16 << 20)
    large, neighbour = slots.take(), slots.take()
    before = os.fstat(descriptor).st_blocks
    theirs.array(large, (large.size,))[:] = 7
    ours.array(neighbour, (neighbour.size,))[:] = 9
    ours.trim(large)
    kept = (os.fstat(descriptor).st_blocks - before) * 512 - neighbour.size
    assert kept == 4 << 20
    assert (theirs.array(neighbour, (neighbour.size,)) == 9).all()
    theirs.array(large, (large.size,))[:] = 8  # it can be used again
    assert (ours.array(large, (large.size,)) == 8).all()
    os.close(descriptor)
