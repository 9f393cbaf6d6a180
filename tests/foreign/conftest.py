"""What the demo models answer over our own interface, and a foreign client to ask the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.foreign.client import ForeignClient, foreign_client
from tests.server import ROOT, RunningServer

SAMPLES = tuple(ROOT / "demo" / "samples" / f"{name}.jpg" for name in ("star", "heart", "ring"))


class Ours:
    """What our own interface answers for the samples.

    Attributes:
        jpegs: the files.
        pixels: their pixels `(H, W, 3)`; not all have one size.
        probabilities: `(samples, classes)`.
    """

    def __init__(self, server: RunningServer) -> None:
        self.jpegs = [sample.read_bytes() for sample in SAMPLES]
        self.pixels = [np.asarray(Image.open(sample)) for sample in SAMPLES]
        answers = [_classify(server, sample) for sample in SAMPLES]
        self.labels = [answer[0]["label"] for answer in answers]
        self.probabilities = np.array(
            [
                [one["score"] for one in sorted(answer, key=lambda one: one["index"])]
                for answer in answers
            ]
        )


def _classify(server: RunningServer, sample: Path) -> list[dict[str, Any]]:
    answer = httpx.post(
        f"{server.http_url}/v1/classify?top_k=12",
        content=sample.read_bytes(),
        headers={"content-type": "image/jpeg"},
        timeout=60,
    )
    predictions: list[dict[str, Any]] = answer.json()["results"][0]["predictions"]
    return predictions


@pytest.fixture(scope="session")
def ours(server: RunningServer) -> Ours:
    return Ours(server)


def addresses(server: RunningServer) -> tuple[str, str]:
    """Of HTTP and gRPC, as clients of others want them."""
    return server.http_url.removeprefix("http://"), server.grpc_target


@pytest.fixture(scope="module")
def triton(server: RunningServer) -> Iterator[ForeignClient]:
    with foreign_client("tritonclient", "triton_calls", *addresses(server)) as client:
        yield client
