"""Time the ways from an uploaded picture to the pixels of a classifier, side by side.

Rounds alternate between the ways; the ratio to the official way (decode, resize the whole picture,
crop) is taken per round, with one thread and with one for each core. The error of a way is the
difference of its pixels from the official ones, in levels of 0 to 255.
"""

import io
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.harness import RATIO, Row, alternate, options, publish, ratio, table
from model import VARIANTS
from model.transforms import Preprocessing
from service import process
from service.images.decode import decode, prepare
from service.open_core import open_workers
from service.settings.limits import Limits

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
        variant: of the model.
    """

    width: int
    height: int
    encoding: str = "JPEG"
    quality: int = 90
    variant: str = "dat_tiny_224"

    @property
    def name(self) -> str:
        """What the table calls it."""
        coding = f" {self.quality} 4:2:0" if self.encoding == "JPEG" else ""
        return f"{self.width}x{self.height} {self.encoding}{coding}"

    def uploads(self) -> list[bytes]:
        """The files."""
        files = [io.BytesIO() for _ in range(PICTURES)]
        for seed, file in enumerate(files):
            picture = make_picture(self.height, self.width, seed)
            picture.save(file, self.encoding, quality=self.quality)
        return [file.getvalue() for file in files]


CASES = (
    Case(224, 224),
    Case(640, 480),
    Case(1024, 768),
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


def official(upload: bytes, preprocessing: Preprocessing) -> Pixels:
    """Decode as the service does, resize the whole picture, then crop."""
    (height, width), (top, left) = preprocessing.image_size, preprocessing.crop_offset
    image = decode(upload, EXACT)
    resized = image.resize(preprocessing.resize_to[::-1], Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + width, top + height)))


WAYS: dict[str, Way] = {
    "official": official,
    "served, `exact`": lambda upload, to: prepare(upload, EXACT, to).pixels,
    "served, `fast`": lambda upload, to: prepare(upload, FAST, to).pixels,
}


def error(pixels: list[Pixels], expected: list[Pixels]) -> dict[str, float]:
    """Largest and mean difference of images, levels."""
    differences = np.abs(np.stack(pixels).astype(np.int16) - np.stack(expected))
    return {"max": int(differences.max()), "mean": float(differences.mean())}


def measure(case: Case, workers: ThreadPoolExecutor, rounds: int) -> list[Row]:
    """Time every way in alternating rounds, once in this thread and once in all workers."""
    uploads, preprocessing = case.uploads(), Preprocessing.of(VARIANTS[case.variant])
    made = {name: [way(file, preprocessing) for file in uploads] for name, way in WAYS.items()}
    cores = os.cpu_count() or 1

    def seconds_each(way: Way, each: Callable[..., Iterable[Pixels]], files: list[bytes]) -> float:
        began = time.perf_counter()
        list(each(lambda file: way(file, preprocessing), files))
        return (time.perf_counter() - began) / len(files)

    settings: dict[str, tuple[Any, list[bytes]]] = {
        "one_thread": (map, uploads),
        "all_cores": (workers.map, uploads * cores),
    }
    sides = {
        (setting, name): partial(seconds_each, way, *how)
        for name, way in WAYS.items()
        for setting, how in settings.items()
    }
    taken = alternate(sides, rounds)
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
        for name in WAYS
    ]


def tables(result: Row) -> str:
    """The table of `decode-cpu.json`."""
    columns = {"picture": "{picture}", "model": "{variant}", "way": "{way}"}
    for title, key in (("one thread", "one_thread"), ("all cores", "all_cores")):
        columns[f"{title} ms"] = f"{{{key}[ms]:.2f}}"
        of_key = RATIO.replace("ratio_range", f"{key}[ratio_range]")
        columns[f"{title} / official (range)"] = of_key.replace("{ratio:", f"{{{key}[ratio]:")
    columns |= {"largest error": "{error[max]}", "mean error": "{error[mean]:.3f}"}
    return table(columns, (case | row for case in result["cases"] for row in case["rows"]))


def main() -> None:
    """Measure all cases, write the result file and print its table."""
    chosen = options("bench.decode", __doc__, rounds=7)
    process.compute_alone()
    cv2.setNumThreads(1)
    with open_workers(os.cpu_count() or 1) as workers:
        measured = [(case, measure(case, workers, chosen.rounds)) for case in CASES]
    cases = [{"picture": c.name, "variant": c.variant, "rows": rows} for c, rows in measured]
    publish("decode-cpu", tables, chosen, cases=cases)


if __name__ == "__main__":
    main()
