"""Where devices compute, from what the system tells of machines that look like real ones."""

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cpus import Seat, nodes, seats
from service.engine.device import Device, open_devices


def machine(root: Path, node_count: int, cores: int, hyper_threads: int) -> int:
    """Write what Linux tells of a machine: `cores` on each node, hyper-threads numbered last.

    Returns:
        How many CPUs it has.
    """
    all_cores = node_count * cores
    for cpu in range(all_cores * hyper_threads):
        siblings = range(cpu % all_cores, all_cores * hyper_threads, all_cores)
        topology = root / "cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(",".join(map(str, siblings)) + "\n")
    for node in range(node_count):
        first = node * cores
        parts = [
            f"{first + shift}-{first + shift + cores - 1}"
            for shift in range(0, all_cores * hyper_threads, all_cores)
        ]
        folder = root / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(parts) + "\n")
    return all_cores * hyper_threads


def share(root: Path, cpus: int, devices: int | None, limit: int = 1 << 10) -> Sequence[Seat]:
    return seats(devices, allowed=range(cpus), limit=limit, system=root)


@pytest.mark.parametrize("hyper_threads", [1, 2])
@pytest.mark.parametrize("cores", [1, 2, 4, 8, 16, 64])
def test_one_device_on_one_node_has_a_thread_for_each_core(tmp_path, cores, hyper_threads):
    cpus = machine(tmp_path, 1, cores, hyper_threads)
    assert share(tmp_path, cpus, 1) == [Seat(cores)]
    assert share(tmp_path, cpus, None) == [Seat(cores)]
    assert share(tmp_path, cpus, 2) == [Seat(max(1, cores // 2))] * 2


def test_each_node_has_a_device_that_keeps_to_it(tmp_path):
    cpus = machine(tmp_path, 2, 32, 2)
    first, second = share(tmp_path, cpus, None)
    assert first == Seat(32, frozenset([*range(32), *range(64, 96)]))
    assert second == Seat(32, frozenset([*range(32, 64), *range(96, 128)]))
    assert share(tmp_path, cpus, 4) == [
        Seat(16, one.cpus) for one in (first, second, first, second)
    ]
    # One that was asked for has the whole machine.
    assert share(tmp_path, cpus, 1) == [Seat(64)]


def test_the_time_of_a_container_is_no_certain_cores(tmp_path):
    cpus = machine(tmp_path, 2, 8, 2)
    assert share(tmp_path, cpus, None, limit=4) == [Seat(4)]
    assert share(tmp_path, cpus, 2, limit=4) == [Seat(2)] * 2
    assert share(tmp_path, cpus, 8, limit=4) == [Seat(1)] * 8


def test_a_container_that_has_some_cpus_counts_only_these(tmp_path):
    machine(tmp_path, 2, 4, 2)
    # Both threads of core 0, one of core 1, and one of a core of the other node.
    allowed = [0, 8, 1, 12]
    assert nodes(allowed, tmp_path) == [[frozenset([0, 8]), frozenset([1])], [frozenset([12])]]
    assert seats(None, allowed=allowed, limit=9, system=tmp_path) == [
        Seat(2, frozenset([0, 1, 8])), Seat(1, frozenset([12]))
    ]  # fmt: skip


def test_a_system_that_tells_nothing_has_cores_alone(tmp_path):
    assert nodes([0, 1, 2], tmp_path) == [[frozenset([0]), frozenset([1]), frozenset([2])]]
    assert share(tmp_path, 3, None) == [Seat(3)]


def test_newer_kernels_have_another_name_for_it(tmp_path):
    machine(tmp_path, 1, 2, 2)
    for file in tmp_path.glob("cpu/*/topology/thread_siblings_list"):
        file.rename(file.with_name("core_cpus_list"))
    assert share(tmp_path, 4, 1) == [Seat(2)]


@settings(deadline=None)  # it writes files
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 2)),
    st.integers(1, 12),
    st.integers(1, 40),
)
def test_no_core_computes_for_two_while_there_are_enough(tmp_path_factory, shape, devices, limit):
    node_count, cores, _ = shape
    root = tmp_path_factory.mktemp("system")
    cpus = machine(root, *shape)
    given_out = share(root, cpus, devices, limit)
    assert len(given_out) == devices
    assert all(seat.threads >= 1 for seat in given_out)
    total = min(limit, node_count * cores)
    if devices <= total and (limit < node_count * cores or devices % node_count == 0):
        assert sum(seat.threads for seat in given_out) <= total
    for one, other in combinations(given_out, 2):
        # Devices have a node in common, or no CPU.
        assert one.cpus == other.cpus or not one.cpus & other.cpus


async def test_the_threads_of_a_device_run_where_it_is_told():
    allowed = os.sched_getaffinity(0)
    cpu = frozenset([min(allowed)])
    device = Device("cpu", 2, cpus=cpu)
    try:
        assert await device.run(lambda: os.sched_getaffinity(0)) == cpu
        in_lanes = device.lanes.map(lambda _: os.sched_getaffinity(0), 2, team=1)
        assert in_lanes == [cpu, cpu]
        assert os.sched_getaffinity(0) == allowed
    finally:
        device.close()


def test_by_default_there_is_a_device_for_each_node_of_this_machine():
    expected = seats(None)
    devices = open_devices("auto")
    try:
        assert [device.threads for device in devices] == [seat.threads for seat in expected]
    finally:
        for device in devices:
            device.close()
