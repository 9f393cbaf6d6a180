"""Which cores compute: hyper-threads are no cores, and a device keeps to its own NUMA node.

Two hyper-threads share the units that multiply, so a second one adds next to nothing to a forward
pass. The memory of another node is slower to reach, so with several nodes each has devices of its
own, with weights of their own. Linux tells both in files under /sys/devices/system
(Documentation/ABI/stable/sysfs-devices-system-cpu and -node of the kernel).
"""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from service.machine import cores

_SYSTEM = Path("/sys/devices/system")

# The hyper-threads of one core, by the numbers of the system.
Core = frozenset[int]


@dataclass(frozen=True)
class Seat:
    """Where a CPU device computes.

    Attributes:
        threads: that compute at a time, one for each core.
        cpus: that they may run on; `None` leaves it to the system.
    """

    threads: int
    cpus: frozenset[int] | None = None


def nodes(allowed: Collection[int], system: Path = _SYSTEM) -> list[list[Core]]:
    """The cores of each NUMA node, as far as they are allowed; nodes without any are left out.

    Args:
        allowed: CPUs, by the numbers of the system.
        system: where the system tells; what it does not tell is one node, of cores without
            hyper-threads.
    """
    cpus = set(allowed)
    of_nodes = [cpus & _listed(folder / "cpulist") for folder in system.glob("node/node[0-9]*")]
    told = set().union(*of_nodes)
    found = [of_node for of_node in (*of_nodes, cpus - told) if of_node]
    return sorted((list(_cores(of_node, system)) for of_node in found), key=_first)


def seats(
    devices: int | None,
    *,
    allowed: Collection[int] | None = None,
    limit: int | None = None,
    system: Path = _SYSTEM,
) -> list[Seat]:
    """Share the cores among CPU devices.

    Args:
        devices: how many; `None` for one on each NUMA node.
        allowed: CPUs that the process may run on; by default what the system says.
        limit: cores' worth of time that the process may have, which may be less than those.
        system: as of `nodes`.

    Returns:
        A seat for each device, with at least one thread.
    """
    of_nodes = nodes(os.sched_getaffinity(0) if allowed is None else allowed, system)
    total = sum(map(len, of_nodes))
    limit = cores() if limit is None else limit
    if limit < total or len(of_nodes) == 1:
        # The time of a container is not that of certain cores.
        count = devices or 1
        return [Seat(max(1, min(limit, total) // count))] * count
    if devices is None:
        devices = len(of_nodes)
    if devices < len(of_nodes):
        return [Seat(total // devices)] * devices
    return [
        Seat(
            max(1, len(of_node) // len(range(index % len(of_nodes), devices, len(of_nodes)))),
            frozenset().union(*of_node),
        )
        for index, of_node in ((at, of_nodes[at % len(of_nodes)]) for at in range(devices))
    ]


def _cores(cpus: set[int], system: Path) -> Iterator[Core]:
    left = set(cpus)
    for cpu in sorted(cpus):
        if cpu in left:
            topology = system / "cpu" / f"cpu{cpu}" / "topology"
            # The second is the name of older kernels.
            named = _listed(topology / "core_cpus_list") or _listed(
                topology / "thread_siblings_list"
            )
            core = frozenset(named & left | {cpu})
            left -= core
            yield core


def _first(of_node: list[Core]) -> int:
    return min(map(min, of_node))


def _listed(file: Path) -> set[int]:
    """The numbers of a list such as `0-3,8`; none where there is no such file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return set()
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
