"""System shared memory: tensors that lie where a client of the same machine put them.

An extension of the Open Inference Protocol that Triton's clients speak: a client registers a part
of a POSIX shared memory object under a name, and its requests then name the region instead of
carrying the bytes. What belongs to nobody's region is never read or written.

Regions are read and written by calls to the system, which copy, and are not mapped: who has a
mapping of an object that its owner shortens is killed by SIGBUS, and what the owner changes later
would change under whoever checked it.
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from service.errors import InvalidRequest, quoted

OBJECTS = Path("/dev/shm")  # noqa: S108  # where Linux keeps POSIX shared memory
MOST_REGIONS = 256  # each is an open file
_LONGEST_NAME = 255  # of a region, characters
# A file name and not a path. Named semaphores lie in the same folder.
_KEY = re.compile(r"/?(?!sem\.|\.{1,2}\Z)[^/\0]{1,255}", re.DOTALL)
_SETTING = "DAT_LIMITS__MAX_SHARED_MEMORY_BYTES"


@dataclass(frozen=True)
class Region:
    """A part of a shared memory object.

    Attributes:
        name: of the region.
        key: of the object, as its client named it.
        offset: of the region in the object, bytes.
        byte_size: of the region.
    """

    name: str
    key: str
    offset: int
    byte_size: int


@dataclass(frozen=True)
class Place:
    """Where in a region a tensor lies.

    Attributes:
        region: its name.
        offset: of the tensor in the region, bytes.
        byte_size: that the tensor may take.
    """

    region: str
    offset: int
    byte_size: int


class SharedMemory:
    """The regions that clients have registered with this process.

    A region belongs to whoever registered it, so that the holder of one API key neither sees nor
    uses those of another.

    Args:
        limit: bytes that all regions together may have; with 0 none can be registered.
        objects: the folder of shared memory objects.
    """

    def __init__(self, limit: int, objects: Path = OBJECTS) -> None:
        self._limit = limit
        self._objects = objects
        self._regions: dict[tuple[str, str], tuple[Region, int]] = {}  # with the open file
        # Requests are read in several threads, and the number of a file that is closed meanwhile
        # may be that of another one.
        self._in_use = Lock()

    @property
    def enabled(self) -> bool:
        """Whether regions can be registered."""
        return self._limit > 0

    def register(self, owner: str, region: Region) -> None:
        """Make a region known.

        Raises:
            InvalidRequest: the region cannot be used; the message says why.
        """
        with self._in_use:
            self._check_room(owner, region)
            file = self._open(region)
            try:
                _check_bounds(region, os.fstat(file))
            except InvalidRequest:
                os.close(file)
                raise
            self._regions[owner, region.name] = region, file

    def unregister(self, owner: str, name: str = "") -> None:
        """Forget a region, or without a name all regions of an owner; unknown ones are none."""
        with self._in_use:
            for one in [one for one in self._regions if one[0] == owner and name in ("", one[1])]:
                _, file = self._regions.pop(one)
                os.close(file)

    def regions(self, owner: str, name: str = "") -> list[Region]:
        """The region of that name, or without a name all regions of an owner.

        Raises:
            InvalidRequest: there is no region of that name.
        """
        if name:
            return [self._find(owner, name)[0]]
        return [region for (by, _), (region, _) in self._regions.items() if by == owner]

    def read(self, owner: str, place: Place) -> bytes:
        """A copy of what lies in a part of a region.

        Raises:
            InvalidRequest: there is no such region, it is smaller than that, or its object is now.
        """
        with self._in_use:
            region, file = self._find(owner, place.region)
            held = os.pread(file, place.byte_size, _begin(region, place))
        if len(held) < place.byte_size:
            raise _shortened(region)
        return held

    def write(self, owner: str, place: Place, content: bytes) -> None:
        """Put bytes at the beginning of a part of a region.

        Raises:
            InvalidRequest: there is no such region, it is smaller than that, or its object is now;
                or the content is larger than the place.
        """
        with self._in_use:
            region, file = self._find(owner, place.region)
            begin = _begin(region, place)
            if len(content) > place.byte_size:
                raise InvalidRequest(
                    f"the output takes {len(content)} bytes, and its place in the shared memory "
                    f"region {quoted(region.name)} has {place.byte_size}"
                )
            if os.fstat(file).st_size < begin + len(content):  # to write would lengthen it
                raise _shortened(region)
            try:
                written = os.pwrite(file, content, begin)
            except OSError as failure:
                written, reason = 0, failure.strerror
            else:
                reason = "no memory is left"
        if written < len(content):
            raise InvalidRequest(f"the region {quoted(region.name)} cannot be written: {reason}")

    def close(self) -> None:
        """Forget all regions."""
        with self._in_use:
            for _, file in self._regions.values():
                os.close(file)
            self._regions.clear()

    def _find(self, owner: str, name: str) -> tuple[Region, int]:
        found = self._regions.get((owner, name))
        if found is None:
            raise InvalidRequest(
                f"no shared memory region {quoted(name)} is registered; register it first"
            )
        return found

    def _check_room(self, owner: str, region: Region) -> None:
        if not self.enabled:
            raise InvalidRequest(
                "shared memory is off on this server; its operator can allow it with "
                f"{_SETTING}, or send tensors in the request"
            )
        if not 0 < len(region.name) <= _LONGEST_NAME:
            raise InvalidRequest(
                f"the name of a region has 1 to {_LONGEST_NAME} characters, not {len(region.name)}"
            )
        if (owner, region.name) in self._regions:
            raise InvalidRequest(
                f"a region {quoted(region.name)} is registered already; unregister it first"
            )
        if len(self._regions) >= MOST_REGIONS:
            raise InvalidRequest(
                f"{MOST_REGIONS} regions are registered, which is the limit; unregister some"
            )
        held = sum(other.byte_size for other, _ in self._regions.values())
        if held + region.byte_size > self._limit:
            raise InvalidRequest(
                f"regions of {held} bytes are registered, and with {region.byte_size} more they "
                f"would exceed the limit of {self._limit} ({_SETTING})"
            )

    def _open(self, region: Region) -> int:
        if not _KEY.fullmatch(region.key):
            raise InvalidRequest(
                f"the key of shared memory is a name of shm_open, such as /input, and not "
                f"{quoted(region.key)}"
            )
        path = self._objects / region.key.removeprefix("/")
        try:
            # No link is followed, and what is no memory does not make us wait.
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as failure:
            reason = failure.strerror if isinstance(failure, OSError) else "the key is no name"
            raise InvalidRequest(
                f"the shared memory {quoted(region.key)} cannot be opened for reading and "
                f"writing: {reason}"
            ) from None


def _check_bounds(region: Region, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidRequest(f"{quoted(region.key)} is no shared memory")
    if region.offset < 0 or region.byte_size <= 0:
        raise InvalidRequest(
            f"a region begins at 0 or later and has a byte or more; offset {region.offset} and "
            f"byte_size {region.byte_size} were given"
        )
    if region.offset + region.byte_size > status.st_size:
        raise InvalidRequest(
            f"the region ends at byte {region.offset + region.byte_size}, and the shared memory "
            f"{quoted(region.key)} has {status.st_size}"
        )


def _begin(region: Region, place: Place) -> int:
    """Where in the object a tensor begins, bytes."""
    if place.offset < 0 or place.byte_size < 0 or place.offset + place.byte_size > region.byte_size:
        raise InvalidRequest(
            f"{place.byte_size} bytes from byte {place.offset} on are not within the region "
            f"{quoted(region.name)}, which has {region.byte_size}"
        )
    return region.offset + place.offset


def _shortened(region: Region) -> InvalidRequest:
    return InvalidRequest(
        f"the shared memory {quoted(region.key)} is shorter than when the region "
        f"{quoted(region.name)} was registered"
    )


def no_cuda() -> InvalidRequest:
    """Why memory of a GPU is not registered."""
    return InvalidRequest(
        "this server reads no CUDA shared memory; register system shared memory, or send tensors "
        "in the request"
    )
