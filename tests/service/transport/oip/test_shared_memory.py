"""Regions of shared memory: what is read is what was registered, and nothing else."""

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.transport.oip.shared_memory import MOST_REGIONS, Place, Region, SharedMemory

ME = "me"
SECRET = b"nobody registered this"


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """A folder as `/dev/shm` is, with a file beside it that no key may name."""
    (tmp_path / "secret").write_bytes(SECRET)
    folder = tmp_path / "shm"
    folder.mkdir()
    return folder


@pytest.fixture
def memory(objects: Path) -> Iterator[SharedMemory]:
    memory = SharedMemory(2**20, objects)
    yield memory
    memory.close()


def make(folder: Path, key: str, content: bytes) -> Region:
    """A shared memory object, and a region that is all of it."""
    (folder / key).write_bytes(content)
    return Region(f"region of {key}", f"/{key}", 0, len(content))


def place(region: Region, offset: int = 0, size: int | None = None) -> Place:
    return Place(region.name, offset, region.byte_size if size is None else size)


numbers = st.integers(-3, 40) | st.sampled_from([2**31, 2**63 - 1, 2**64, -(2**63)])


@given(
    size=st.integers(0, 30), region=st.tuples(numbers, numbers), part=st.tuples(numbers, numbers)
)
def test_what_is_within_the_region_is_read_and_all_else_refused(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    region: tuple[int, int],
    part: tuple[int, int],
) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = bytes(range(size))
    whole = make(folder, "object", content)
    (offset, length), (start, count) = region, part
    named = Region("r", whole.key, offset, length)
    memory = SharedMemory(2**70, folder)
    if not (offset >= 0 and length > 0 and offset + length <= size):
        with pytest.raises(InvalidRequest):
            memory.register(ME, named)
        assert memory.regions(ME) == []
        return
    memory.register(ME, named)
    wanted = Place("r", start, count)
    if start >= 0 and count >= 0 and start + count <= length:
        assert memory.read(ME, wanted) == content[offset:][:length][start : start + count]
        memory.write(ME, wanted, b"\xff" * count)
        now, begin = (folder / "object").read_bytes(), offset + start
        assert now == content[:begin] + b"\xff" * count + content[begin + count :]
    else:
        with pytest.raises(InvalidRequest, match="not within the region"):
            memory.read(ME, wanted)
        with pytest.raises(InvalidRequest, match="not within the region"):
            memory.write(ME, wanted, b"")
        assert (folder / "object").read_bytes() == content
    memory.close()


@pytest.mark.parametrize(
    "key",
    ["", "/", ".", "/.", "..", "/..", "../secret", "/../secret", "folder/inner", "//object",
     "/object/", "nul\0", "sem.other", "/sem.other", "link", "pipe", "folder", "missing",
     "x" * 256, "\udcff", "é" * 255],
)  # fmt: skip
def test_a_key_that_is_no_memory_of_that_folder_is_refused(
    memory: SharedMemory, objects: Path, key: str
) -> None:
    make(objects, "object", b"content")
    make(objects, "sem.other", b"a named semaphore")
    (objects / "folder").mkdir()
    make(objects / "folder", "inner", b"content")
    (objects / "link").symlink_to("../secret")
    os.mkfifo(objects / "pipe")
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InvalidRequest):
        memory.register(ME, Region("r", key, 0, 4))
    assert memory.regions(ME) == []
    assert len(os.listdir("/proc/self/fd")) == files


def test_an_absolute_path_is_refused(memory: SharedMemory, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="name of shm_open"):
        memory.register(ME, Region("r", str(tmp_path / "secret"), 0, 4))


def test_a_name_that_was_not_registered_is_unknown(memory: SharedMemory, objects: Path) -> None:
    region = make(objects, "object", b"content")
    for use in (
        lambda: memory.read(ME, place(region)),
        lambda: memory.write(ME, place(region), b""),
        lambda: memory.regions(ME, region.name),
    ):
        with pytest.raises(InvalidRequest, match="register it first"):
            use()
    memory.register(ME, region)
    assert memory.read(ME, place(region)) == b"content"
    assert memory.regions(ME, region.name) == memory.regions(ME) == [region]
    memory.unregister(ME, region.name)
    with pytest.raises(InvalidRequest, match="register it first"):
        memory.read(ME, place(region))


def test_a_region_belongs_to_who_registered_it(memory: SharedMemory, objects: Path) -> None:
    mine, theirs = make(objects, "mine", b"mine"), make(objects, "theirs", b"theirs")
    memory.register(ME, mine)
    memory.register("them", theirs)
    memory.register("them", Region(mine.name, theirs.key, 0, 1))  # names are each owner's own
    with pytest.raises(InvalidRequest):
        memory.read(ME, place(theirs))
    assert memory.regions(ME) == [mine]
    memory.unregister(ME)
    assert memory.regions(ME) == []
    assert memory.read("them", place(theirs)) == b"theirs"


def test_an_object_that_was_shortened_kills_nobody(memory: SharedMemory, objects: Path) -> None:
    region = make(objects, "object", b"content")
    memory.register(ME, region)
    os.truncate(objects / "object", 3)
    with pytest.raises(InvalidRequest, match="shorter"):
        memory.read(ME, place(region))
    with pytest.raises(InvalidRequest, match="shorter"):
        memory.write(ME, place(region), b"CONTENT")
    assert (objects / "object").read_bytes() == b"con"
    assert memory.read(ME, place(region, 0, 3)) == b"con"


def test_an_output_that_does_not_fit_is_not_written(memory: SharedMemory, objects: Path) -> None:
    region = make(objects, "object", b"content")
    memory.register(ME, region)
    with pytest.raises(InvalidRequest, match=r"takes 4 bytes.*has 3"):
        memory.write(ME, place(region, 1, 3), b"1234")
    assert (objects / "object").read_bytes() == b"content"


def test_a_region_that_is_forgotten_keeps_no_file(memory: SharedMemory, objects: Path) -> None:
    files = len(os.listdir("/proc/self/fd"))
    for index in range(5):
        memory.register(ME, make(objects, f"object-{index}", b"content"))
    assert len(os.listdir("/proc/self/fd")) == files + 5
    memory.unregister(ME, "region of object-0")
    memory.unregister(ME, "nobody's")
    assert len(memory.regions(ME)) == 4
    memory.unregister(ME)
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_file_is_not_closed_while_it_is_read(
    memory: SharedMemory, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number would be that of the next one, whose bytes were then read in its place."""
    mine, other = make(objects, "mine", b"mine"), make(objects, "other", b"text")
    memory.register(ME, mine)

    def forget() -> None:
        memory.unregister(ME, mine.name)
        memory.register("them", other)

    forgetting, read = Thread(target=forget), os.pread

    def pread(file: int, size: int, offset: int) -> bytes:
        forgetting.start()
        forgetting.join(0.2)
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert memory.read(ME, place(mine)) == b"mine"
    forgetting.join()
    assert memory.regions(ME) == []


def test_a_name_is_used_once(memory: SharedMemory, objects: Path) -> None:
    region = make(objects, "object", b"content")
    memory.register(ME, region)
    with pytest.raises(InvalidRequest, match="unregister it first"):
        memory.register(ME, region)
    memory.unregister(ME, region.name)
    memory.register(ME, region)


@pytest.mark.parametrize("name", ["", "n" * 256])
def test_a_region_needs_a_name_of_some_length(
    memory: SharedMemory, objects: Path, name: str
) -> None:
    make(objects, "object", b"content")
    with pytest.raises(InvalidRequest, match="1 to 255"):
        memory.register(ME, Region(name, "object", 0, 1))


def test_bytes_and_regions_have_a_limit(objects: Path) -> None:
    make(objects, "object", b"content")
    memory = SharedMemory(10, objects)
    memory.register(ME, Region("a", "object", 0, 7))
    with pytest.raises(InvalidRequest, match="limit of 10"):
        memory.register("them", Region("b", "object", 0, 4))
    memory.register("them", Region("b", "object", 0, 3))
    memory.unregister(ME)
    memory.register("them", Region("c", "object", 0, 7))
    memory.close()
    many = SharedMemory(2**20, objects)
    for index in range(MOST_REGIONS):
        many.register(ME, Region(f"{index}", "object", 0, 1))
    with pytest.raises(InvalidRequest, match="unregister some"):
        many.register(ME, Region("one more", "object", 0, 1))
    many.close()


def test_without_the_setting_none_can_be_registered(objects: Path) -> None:
    memory = SharedMemory(0, objects)
    assert not memory.enabled
    with pytest.raises(InvalidRequest, match="DAT_LIMITS__MAX_SHARED_MEMORY_BYTES"):
        memory.register(ME, make(objects, "object", b"content"))
