"""A server whose models change while it is asked: their files, and who asks."""

import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
from safetensors import safe_open
from safetensors.torch import save_file

from service.models.load import BUNDLED
from service.pb import dat_pb2_grpc
from tests.clients import JPEG, Answer, channel, message, read_grpc, read_http
from tests.server import RunningServer

LETTERS = "ab"  # of kinds of weights: `a` is the demo model, `b` has its classes in another order
CLASSES = 12


class ModelFolder:
    """A model file with its checkpoints, written as one should: under another name first.

    Names of classes begin with the letter of their weights.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "models.toml"
        with safe_open(BUNDLED["dat_nano"], "pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for shift, letter in enumerate(LETTERS):
            moved = {
                name: tensor.roll(shift, 0).contiguous() if name.startswith("head.") else tensor
                for name, tensor in state.items()
            }
            save_file(moved, folder / f"{letter}.kept.safetensors", {"variant": "dat_nano"})
            labels = "\n".join(f"{letter}{index}" for index in range(CLASSES))
            (folder / f"{letter}.txt").write_text(labels)
        self._folder = folder
        self._written: dict[str, str] = {}  # version by name of the model

    def put(self, name: str, content: str | bytes) -> None:
        """Write a file at once."""
        self._written.pop(name.removesuffix(".safetensors"), None)
        kept, new = self._folder / name, self._folder / f"{name}.new"
        if name.endswith(".safetensors") and isinstance(content, str):
            shutil.copy(self._folder / f"{content}.kept.safetensors", new)
        elif isinstance(content, str):
            new.write_text(content)
        else:
            new.write_bytes(content)
        new.replace(kept)

    def serve(
        self, models: Mapping[str, str], *, default: str | None = None, **more: str | int
    ) -> None:
        """Name models, each by its version: a letter and a number.

        Args:
            models: version of each by its name.
            default: name of one.
            **more: settings of the first.
        """
        lines = [] if default is None else [f'default = "{default}"']
        for name, version in models.items():
            chosen = {"labels": f"{version[0]}.txt"} | more
            lines += [
                "[[models]]",
                f'name = "{name}"',
                f'version = "{version}"',
                f'checkpoint = "{name}.safetensors"',
                "max_batch = 4",
                *(f'{key} = "{value}"' for key, value in chosen.items()),
            ]
            more = {}
            if self._written.get(name) != version:
                self.put(f"{name}.safetensors", version[0])
                self._written[name] = version
        self.put("models.toml", "\n".join(lines))


async def reload(server: RunningServer) -> list[dict[str, Any]]:
    """Reload, and return the lines of the log that say what became of the models."""
    server.process.send_signal(signal.SIGHUP)
    return await until_reloaded(server)


async def until_reloaded(server: RunningServer) -> list[dict[str, Any]]:
    """Wait for the end of a reload, and return the lines of the log about models."""
    lines: list[dict[str, Any]] = []
    while True:
        line = await asyncio.to_thread(server.log.get, timeout=60)
        assert line, "the server ended"
        if line["event"] in ("reloaded", "reload failed"):
            return [*lines, line]
        if line["event"].startswith("model "):
            lines.append(line)


@dataclass
class Asked:
    """What a crowd was answered.

    Attributes:
        versions: how often each version of a model answered, by its name and version.
        failures: answers that were none.
        predictions: what each kind of weights says of the picture.
    """

    versions: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    predictions: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def take(self, answer: Answer) -> None:
        """Check an answer against its version."""
        if answer.error is not None:
            self.failures.append(f"{answer.error}: {answer.message}")
            return
        letter = answer.version[0]
        (result,) = answer.results
        ranked = tuple((label, index) for label, index, _ in result.predictions)
        assert all(label == f"{letter}{index}" for label, index in ranked), answer
        assert self.predictions.setdefault(letter, ranked) == ranked, answer
        self.versions[answer.model, answer.version] += 1


@asynccontextmanager
async def crowd(server: RunningServer, *models: str) -> AsyncIterator[Asked]:
    """Ask for models over HTTP and gRPC all the time; two of each at a time for each model."""
    asked, stop = Asked(), False

    async def over_http(model: str) -> None:
        async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
            while not stop:
                response = await client.post(f"/v1/classify?model={model}", content=JPEG)
                asked.take(read_http(response))

    async def over_grpc(model: str) -> None:
        async with channel(server) as open_channel:
            stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
            while not stop:
                try:
                    answer = read_grpc(await stub.Classify(message([JPEG], model=model)))
                except grpc.aio.AioRpcError as error:
                    answer = Answer(error.code().name, message=error.details() or "")
                asked.take(answer)

    asking = [
        asyncio.create_task(ask(model)) for model in models for ask in (over_http, over_grpc) * 2
    ]
    try:
        yield asked
    finally:
        stop = True
        await asyncio.gather(*asking)


async def answered(asked: Asked, model: str, version: str) -> None:
    """Wait until a version has answered."""
    async with asyncio.timeout(30):
        while not asked.versions[model, version]:
            await asyncio.sleep(0.01)


def processes(server: RunningServer) -> list[int]:
    """The server and its children."""
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def memory(server: RunningServer) -> int:
    """Bytes of all processes, what they share counted once."""
    total = 0
    for pid in processes(server):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def descriptors(server: RunningServer) -> int:
    """Open files of all processes."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in processes(server))
