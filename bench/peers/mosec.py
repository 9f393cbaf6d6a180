"""mosec: one stage of workers that decode and compute; the HTTP server is in Rust.

A stage that decodes and one that computes would hand 150 kB of pixels from process to process for
each image, and two cores have no third stage to overlap.
"""

from typing import Any

from mosec import Server, Worker

from bench.peers.classifier import Classifier
from bench.peers.setting import Setting

SETTING = Setting.read()


class Classify(Worker):
    """A process with an engine."""

    def __init__(self) -> None:
        super().__init__()
        self._classifier = Classifier(SETTING.threads, SETTING.batch)

    def deserialize(self, data: bytes) -> bytes:
        """The body is the JPEG, in a buffer of its own."""
        return bytes(data)

    def forward(self, data: Any) -> Any:
        """A batch, or where nothing is batched one image."""
        return self._classifier.answer(data) if SETTING.batch > 1 else self._one(data)

    def _one(self, jpeg: bytes) -> Any:
        return self._classifier.answer([jpeg])[0]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Classify,
        num=SETTING.workers,
        max_batch_size=SETTING.batch,
        max_wait_time=SETTING.wait_ms,
        timeout=60,
    )
    server.run()
