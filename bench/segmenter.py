"""Measure segmenters: what an image takes, stage by stage, beside the rate of a matrix product.

An upload of 768x1024 pixels becomes an input of 512x683 (of the published models), and its labels
are at its own size again. A large matrix product is timed in the same rounds: at its rate the
multiply-adds of the model take the *floor*. Memory is that of a process of its own.
"""

import io
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.engine import PRODUCT_SIDE
from bench.growth import open_device
from bench.harness import Row, alternate, options, publish, ratio, table
from bench.load import make_jpeg
from bench.memory import IN_USE_ALONE, in_own_process, most_taken
from bench.stages import Stopwatch
from model.normalise import Normalise
from model.segmentation import SEGMENTERS, Segmenter, create_segmenter
from model.segmentation.cost import flops
from model.segmentation.labelling import Pass, Segmentation, label_pixels
from model.segmentation.transforms import to_model_pixels
from service.memory import keep_freed
from tests.model.segmentation.conftest import segmenter_state

UPLOAD = (768, 1024)  # `(H, W)`, pixels
STAGES = ("pre-processing", "backbone", "head", "labels")


def make_segmenter(name: str) -> Segmenter:
    """A segmenter with random weights, whose logits are spread as those of the golden cases."""
    segmenter = create_segmenter(name)
    segmenter.load_state_dict(segmenter_state(segmenter.config))
    return segmenter


def make_picture() -> NDArray[np.uint8]:
    """One that the load generator sends."""
    with Image.open(io.BytesIO(make_jpeg(*UPLOAD, seed=0))) as picture:
        return np.asarray(picture)


@torch.inference_mode()
def time_stages(
    segmenter: Segmenter, pixels: NDArray[np.uint8]
) -> tuple[Segmentation, dict[str, float]]:
    """Segment a picture `(H, W, 3)`, and return the seconds of each of `STAGES` too."""
    stopwatch = Stopwatch()
    resizing = segmenter.config.resizing(pixels.shape[:2])
    backbone = segmenter.backbone_for(resizing.resized)

    def see() -> torch.Tensor:
        seen = torch.from_numpy(to_model_pixels(pixels, resizing))
        images: torch.Tensor = Normalise()(seen.unsqueeze(0))
        return images

    def label() -> Segmentation:
        return label_pixels([Pass(logits[0], resizing.resized)], pixels.shape[:2])

    images = stopwatch.run("pre-processing", see)
    features = stopwatch.run("backbone", backbone, images)
    logits = stopwatch.run("head", segmenter.decode_head, features.maps)
    found = stopwatch.run("labels", label)
    return found, {stage: stopwatch.seconds[stage] for stage in STAGES}


def memory_of_image(name: str, threads: int) -> int:
    """Most memory that an image takes beside its segmenter, bytes."""
    open_device(threads)
    segmenter, picture = make_segmenter(name), make_picture()
    return most_taken(partial(time_stages, segmenter, picture))


def product_of(side: int) -> Callable[[], dict[str, float]]:
    """Times a product of two square matrices, seconds."""
    left, right = torch.rand(2, side, side)

    def call() -> dict[str, float]:
        began = perf_counter()
        torch.mm(left, right)
        return {"product": perf_counter() - began}

    return call


def measure(name: str, chosen: Namespace) -> Row:
    """Memory, then stages and the matrix product in alternating rounds."""
    memory = in_own_process(IN_USE_ALONE, memory_of_image, name, chosen.threads)
    segmenter, picture = make_segmenter(name), make_picture()
    sides: dict[str, Callable[[], dict[str, float]]] = {
        "stages": lambda: time_stages(segmenter, picture)[1],
        "product": product_of(PRODUCT_SIDE),
    }
    taken = alternate(sides, chosen.rounds, unmeasured=1)
    seconds = [sum(stages.values()) for stages in taken["stages"]]
    size = segmenter.config.resizing(UPLOAD).resized
    work = flops(segmenter.config, size)
    floors = [work / PRODUCT_SIDE**3 * one["product"] for one in taken["product"]]
    return {
        "name": name,
        "upload": UPLOAD,
        "size": size,
        "flops": work,
        "seconds": median(seconds),
        "floor_s": median(floors),
        **ratio(floors, seconds),
        "stages_ms": {
            stage: 1e3 * median(stages[stage] for stages in taken["stages"]) for stage in STAGES
        },
        "memory_bytes": memory,
    }


def tables(result: Row) -> str:
    """The table of `segmenter-cpu-float32.json`."""
    columns = {
        "model": "{name}",
        "input": "{size:x}",
        "GFLOPs": "{flops:/1e9 .1f}",
        "seconds": "{seconds:.2f}",
        "floor, seconds": "{floor_s:.2f}",
        "floor / time (range)": "**{ratio:.0%}** ({ratio_range[0]:.0%}-{ratio_range[1]:.0%})",
        **{f"{stage} ms": f"{{stages_ms[{stage}]:.0f}}" for stage in STAGES},
        "MB an image": "{memory_bytes:/1e6 .0f}",
    }
    return table(columns, result["models"])


def main() -> None:
    """Measure the models of the command line, one after another."""
    chosen = options(
        "bench.segmenter",
        __doc__,
        {"models": SEGMENTERS},
        models=[name for name in SEGMENTERS if "dat_pp" in name],
        rounds=5,
        threads=None,
    )
    open_device(chosen.threads)
    keep_freed()
    models = [measure(name, chosen) for name in chosen.models]
    publish("segmenter-cpu-float32", tables, chosen, models=models)


if __name__ == "__main__":
    main()
