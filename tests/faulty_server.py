"""The server with a device that fails when it is told to: `python -m tests.faulty_server FOLDER`.

A file in the folder names the fault of every batch; a picture of one colour carries a fault of
its own:

    hang     the thread of the device waits for ever
    wait     it waits as long as the file is there
    exit     the thread ends
    lost     the context of the device breaks
    hiccup   the device refuses something, and is as well as before
    memory   the batch takes more memory than there is; `memory-N`, with more than N images
    error    the batch fails
    leak     some memory of each image stays

Green pictures hang, red ones fail, blue ones take more memory than there is, and the answers of
white ones cannot be made. The file `decode` lets the threads that decode wait for ever, and `load`
lets what loads a model wait as long as the file is there.
"""

import os
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import torch

from service.cli import main
from service.engine.classification import ClassificationEngine
from service.engine.computing import Computing
from service.images import decode
from service.processes import birth
from service.tasks import classification
from service.tasks.passage import Computed, ImagePassage

folder = Path(sys.argv[1])
launch, load = ClassificationEngine.launch, ClassificationEngine._load
prepare, submit = decode.prepare, ImagePassage.submit
COLOURS = {"hang": (0, 255, 0), "error": (255, 0, 0), "memory": (0, 0, 255)}
UNSHOWABLE = (255, 255, 255)
LEAK_BYTES = 1 << 16  # of an image
leaked: list[bytes] = []


def is_colour(pixels: Any, colour: tuple[int, int, int]) -> bool:
    return bool((pixels == colour).all())


def break_down(_: object = None) -> NoReturn:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def wait_while(file: str) -> None:
    while (folder / file).exists():
        time.sleep(0.01)


def fail(fault: str) -> None:
    match fault:
        case "hang":
            Event().wait()
        case "wait":
            wait_while("wait")
        case "exit":
            raise SystemExit
        case "lost":
            torch.cpu.synchronize = break_down  # type: ignore[assignment]
            break_down()
        case "hiccup":
            raise torch.AcceleratorError("CUDA error: invalid configuration argument")
        case "memory":
            torch.empty(1 << 60, dtype=torch.uint8)  # what torch says then on this device
        case "error":
            raise RuntimeError("told to fail")


def faulty_launch(
    self: ClassificationEngine, batch: Sequence[Any], cores: int | None = None
) -> Any:
    for file in folder.iterdir():
        fault, _, most = file.name.partition("-")
        if fault == "leak":
            leaked.extend(os.urandom(LEAK_BYTES) for _ in batch)
        elif not most or len(batch) > int(most):
            fail(fault)
    for item in batch:
        for fault, colour in COLOURS.items():
            if is_colour(item.pixels, colour):
                fail(fault)
    return launch(self, batch, cores)


def faulty_load(self: ClassificationEngine) -> Generator[None, None, Computing]:
    wait_while("load")
    return load(self)


def faulty_prepare(*arguments: Any) -> Any:
    if (folder / "decode").exists():
        fail("hang")
    return prepare(*arguments)


async def faulty_submit(self: ImagePassage, item: Any) -> Computed:
    unshowable = is_colour(item.pixels, UNSHOWABLE)  # the result may take the place of the pixels
    computed = await submit(self, item)
    if unshowable:
        raise ValueError("told to fail")
    return computed


if __name__ == "__main__":
    ClassificationEngine.launch = faulty_launch  # type: ignore[method-assign]
    ClassificationEngine._load = faulty_load  # type: ignore[method-assign]
    classification.prepare = faulty_prepare  # type: ignore[attr-defined, assignment]
    ImagePassage.submit = faulty_submit  # type: ignore[method-assign]
    birth.COMMAND = (sys.executable, "-m", "tests.faulty_server", str(folder), "child")
    sys.argv = ["dat-serve", *sys.argv[2:]]
    main()
