"""Time the ways from an uploaded picture to the pixels of a classifier, side by side.

Every way begins with the checks of `service.images.containers`. Rounds alternate between the ways;
the ratio to the official way (decode, resize the whole picture, crop) is taken per round, with one
thread and with one for each core. The error of a way is the difference of its pixels from the
official ones, in levels of 0 to 255. simplejpeg, which the service does not depend on, takes part
where it is installed.
"""

import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from statistics import median

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from bench.harness import in_turn, options, publish, ratio
from bench.machine import describe
from bench.tables import Row, table
from model import VARIANTS
from model.transforms import Preprocessing, to_model_pixels
from service import process
from service.images.containers import read_container
from service.images.decode import decode, prepare
from service.open_core import open_workers
from service.settings import Limits

PICTURES = 2  # of a case
EXACT, FAST = Limits(), Limits(decode="fast")

Pixels = NDArray[np.uint8]
Way = Callable[[bytes, Preprocessing], Pixels]


@dataclass(frozen=True)
class Case:
    """Uploads of one kind, and a model that they are for.

    Attributes:
        width: of the pictures, pixels.
        height: likewise.
        encoding: the name that Pillow knows the format by.
        quality: of the encoder; of no meaning for PNG.
        subsampling: of the colours of a JPEG, as Pillow counts: 0 is 4:4:4, 2 is 4:2:0.
        variant: of the model.
    """

    width: int
    height: int
    encoding: str = "JPEG"
    quality: int = 90
    subsampling: int = 2
    variant: str = "dat_tiny_224"

    @property
    def name(self) -> str:
        """What the table calls it."""
        coding = self.encoding
        if coding == "JPEG":
            coding += f" {self.quality} {'4:4:4' if self.subsampling == 0 else '4:2:0'}"
        return f"{self.width}x{self.height} {coding}"

    def uploads(self) -> list[bytes]:
        """The files."""
        options: dict[str, int] = {"quality": self.quality}
        if self.encoding == "JPEG":
            options["subsampling"] = self.subsampling
        return [
            encode(make_picture(self.height, self.width, seed), self.encoding, **options)
            for seed in range(PICTURES)
        ]


CASES = (
    Case(224, 224),
    Case(640, 480),
    Case(1024, 768),
    Case(1024, 768, quality=75),
    Case(1024, 768, subsampling=0),
    Case(3000, 2000, quality=75),
    Case(1024, 768, "PNG"),
    Case(1024, 768, "WEBP"),
    Case(1024, 768, variant="dat_base_384"),
    Case(3000, 2000, quality=75, variant="dat_base_384"),
)


def make_picture(height: int, width: int, seed: int) -> Image.Image:
    """A picture with the spectrum of a photograph: details of all sizes, edges, a little noise."""
    generator = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, contrast in ((4, 60), (12, 30), (40, 18), (130, 10), (400, 5)):
        coarse = generator.normal(0, contrast, (cells, cells)).astype(np.float32)
        detail = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        tint = generator.uniform(0.6, 1.4, 3).astype(np.float32)
        pixels += np.asarray(detail)[..., None] * tint
    rows, columns = np.indices((height, width), np.float32)
    for _ in range(12):
        y, x, radius = generator.uniform(0, 1, 3) * (height, width, min(height, width) / 5)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        pixels[inside] += generator.normal(0, 50, 3).astype(np.float32)
    pixels += generator.normal(0, 4, pixels.shape).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(picture: Image.Image, encoding: str, **options: int) -> bytes:
    """The file of a picture."""
    out = io.BytesIO()
    picture.save(out, encoding, **options)
    return out.getvalue()


# Decoders: from an upload to an image, for a model.


def pillow(upload: bytes, _: Preprocessing) -> Image.Image:
    """With all checks of the service."""
    return decode(upload, EXACT)


def simplejpeg(upload: bytes, _: Preprocessing) -> Image.Image:
    """Errors of the data are not raised by it as they are by Pillow."""
    pixels = import_module("simplejpeg").decode_jpeg(read_container(upload).data, "RGB")
    return Image.fromarray(pixels)


def opencv(upload: bytes, _: Preprocessing) -> Image.Image:
    """Decode with OpenCV."""
    data = np.frombuffer(read_container(upload).data, np.uint8)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return Image.fromarray(np.asarray(cv2.imdecode(data, flags), np.uint8))


def reduced(upload: bytes, preprocessing: Preprocessing) -> Image.Image:
    """A JPEG at a half, a quarter or an eighth of its size, at least the one it is resized to."""
    image = Image.open(io.BytesIO(read_container(upload).data))
    image.draft(None, preprocessing.resize_to[::-1])
    return image


# Resizers: from an image to pixels of a model.


def resize_whole(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Resize the whole picture with Pillow, then crop."""
    (height, width), (top, left) = preprocessing.image_size, preprocessing.crop_offset
    resized = image.resize(preprocessing.resize_to[::-1], Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + width, top + height)))


def torch_resize(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Resize the whole picture with torch, then crop."""
    (height, width), (top, left) = preprocessing.image_size, preprocessing.crop_offset
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(images, preprocessing.resize_to, mode="bicubic", antialias=True)
    cropped = resized[0, :, top : top + height, left : left + width]
    return cropped.permute(1, 2, 0).contiguous().numpy()


def way(
    decoded: Callable[[bytes, Preprocessing], Image.Image],
    resized: Callable[[Image.Image, Preprocessing], Pixels],
) -> Way:
    """Decode, then resize."""
    return lambda upload, preprocessing: resized(decoded(upload, preprocessing), preprocessing)


WAYS: dict[str, Way] = {
    "official": way(pillow, resize_whole),
    "served, `exact`": lambda upload, to: prepare(upload, EXACT, to).pixels,
    "served, `fast`": lambda upload, to: prepare(upload, FAST, to).pixels,
    "simplejpeg": way(simplejpeg, to_model_pixels),
    "OpenCV": way(opencv, to_model_pixels),
    "Pillow, torch resizes": way(pillow, torch_resize),
    "OpenCV, torch resizes": way(opencv, torch_resize),
    "Pillow at reduced size, torch resizes": way(reduced, torch_resize),
}
FOR_JPEG = {"served, `fast`", "simplejpeg", "Pillow at reduced size, torch resizes"}


def ways_for(encoding: str) -> dict[str, Way]:
    """Those that differ from another for this format, the official one first."""
    missing = set() if find_spec("simplejpeg") else {"simplejpeg"}
    if encoding != "JPEG":
        missing |= FOR_JPEG
    return {name: way for name, way in WAYS.items() if name not in missing}


def error(pixels: list[Pixels], expected: list[Pixels]) -> dict[str, float]:
    """Largest and mean difference of images, levels."""
    differences = np.abs(np.stack(pixels).astype(np.int16) - np.stack(expected))
    return {"max": int(differences.max()), "mean": float(differences.mean())}


def measure(case: Case, workers: ThreadPoolExecutor, rounds: int) -> list[Row]:
    """Time every way in alternating rounds, once in this thread and once in all workers."""
    uploads, preprocessing = case.uploads(), Preprocessing.of(VARIANTS[case.variant])
    ways = ways_for(case.encoding)
    made = {name: [way(file, preprocessing) for file in uploads] for name, way in ways.items()}
    cores = os.cpu_count() or 1

    def one_thread(way: Way) -> float:
        began = time.perf_counter()
        for file in uploads:
            way(file, preprocessing)
        return (time.perf_counter() - began) / len(uploads)

    def all_cores(way: Way) -> float:
        began = time.perf_counter()
        list(workers.map(lambda file: way(file, preprocessing), uploads * cores))
        return (time.perf_counter() - began) / len(uploads) / cores

    settings = {"one_thread": one_thread, "all_cores": all_cores}
    sides = {
        (setting, name): partial(in_setting, way)
        for name, way in ways.items()
        for setting, in_setting in settings.items()
    }
    timed = in_turn(sides, rounds)
    taken = {side: [one[side] for one in timed] for side in sides}
    return [
        {
            "way": name,
            "error": error(made[name], made["official"]),
            **{
                setting: {
                    "ms": 1e3 * median(taken[setting, name]),
                    **ratio(taken[setting, name], taken[setting, "official"]),
                }
                for setting in settings
            },
        }
        for name in ways
    ]


def tables(result: Row) -> str:
    """The table of `decode-cpu.json`."""
    columns = {"picture": "{picture}", "model": "{variant}", "way": "{way}"}
    for title, key in (("one thread", "one_thread"), ("all cores", "all_cores")):
        columns[f"{title} ms"] = f"{{{key}[ms]:.2f}}"
        columns[f"{title} / official (range)"] = (
            f"**{{{key}[ratio]:.2f}}** "
            f"({{{key}[ratio_range][0]:.2f}}-{{{key}[ratio_range][1]:.2f}})"
        )
    columns |= {"largest error": "{error[max]}", "mean error": "{error[mean]:.3f}"}
    return table(columns, (case | row for case in result["cases"] for row in case["rows"]))


def main() -> None:
    """Measure all cases, write the result file and print its table."""
    chosen = options("bench.decode", __doc__, rounds=7)
    process.compute_alone()
    cv2.setNumThreads(1)
    with open_workers(os.cpu_count() or 1) as workers:
        cases = [
            {
                "picture": case.name,
                "variant": case.variant,
                "rows": measure(case, workers, chosen.rounds),
            }
            for case in CASES
        ]
    machine = describe("bench.decode", "cpu")
    publish("decode-cpu", tables, {"machine": machine, "rounds": chosen.rounds, "cases": cases})


if __name__ == "__main__":
    main()
