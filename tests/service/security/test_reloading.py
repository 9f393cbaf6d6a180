"""Files are read again when they changed, however that was done."""

import asyncio
import os
from contextlib import asynccontextmanager, suppress

import pytest
from prometheus_client import CollectorRegistry

from service.command_errors import CommandError
from service.metrics.replica import Metrics
from service.security import reloading
from service.security.reloading import Reloading


class Files:
    """Two files that belong together, as a mounted Secret has them."""

    def __init__(self, folder):
        self.folder = folder
        self.paths = [folder / "one", folder / "two"]
        self.metrics = Metrics(CollectorRegistry())
        self.told = []
        self.reads = 0

    def write(self, one, two=None):
        self.paths[0].write_text(one)
        self.paths[1].write_text(one if two is None else two)

    def read(self):
        self.reads += 1
        try:
            texts = [path.read_text() for path in self.paths]
        except OSError as fault:
            raise CommandError(str(fault)) from fault
        if len(set(texts)) > 1:
            raise CommandError(f"{texts} do not belong together")
        return texts[0]

    def count(self, outcome):
        name = "dat_security_reloads_total"
        return self.metrics.registry.get_sample_value(name, {"kind": "keys", "outcome": outcome})


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(reloading, "LOOK_S", 0.01)
    return Files(tmp_path)


@asynccontextmanager
async def watched(files):
    watched = Reloading("keys", files.paths, files.read, files.told.append, files.metrics)
    watching = asyncio.create_task(watched.watch())
    try:
        yield watched
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_file_that_is_written_or_replaced_is_read_once(files):
    files.write("a")
    async with watched(files) as value:
        await asyncio.sleep(0.1)
        assert (value.value, files.told, files.reads) == ("a", ["a"], 1)
        files.write("b")
        await until(lambda: value.value == "b")
        for path in files.paths:  # of the same size, and of the same second
            new = path.with_suffix(".new")
            new.write_text("c")
            os.replace(new, path)
        await until(lambda: value.value == "c")
        await asyncio.sleep(0.1)
    assert files.told == ["a", "b", "c"]
    assert files.count("failed") == 0


async def test_the_one_link_of_a_mounted_secret_is_followed(files):
    for version in ("..1", "..2"):
        (files.folder / version).mkdir()
        for path in files.paths:
            (files.folder / version / path.name).write_text(version)
    (files.folder / "..data").symlink_to("..1")
    for path in files.paths:
        path.symlink_to(f"..data/{path.name}")
    async with watched(files) as value:
        assert value.value == "..1"
        (files.folder / "..tmp").symlink_to("..2")
        os.replace(files.folder / "..tmp", files.folder / "..data")
        await until(lambda: value.value == "..2")
    assert (files.count("ok"), files.count("failed")) == (1, 0)


async def test_what_cannot_be_used_changes_nothing_and_is_told_once(files):
    files.write("a")
    async with watched(files) as value:
        files.write("b", "c")
        await until(lambda: files.count("failed") == 1)
        await asyncio.sleep(0.1)
        assert files.count("failed") == 1
        files.paths[1].unlink()
        await until(lambda: files.count("failed") == 2)
        assert (value.value, files.told) == ("a", ["a"])
        files.write("d")
        await until(lambda: value.value == "d")
    assert files.count("ok") == 1
