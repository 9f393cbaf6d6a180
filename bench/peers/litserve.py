"""LitServe: workers with batches behind a process for HTTP, joined by ZeroMQ (`fast_queue`).

By default it has as many processes for HTTP as workers; two cores are few for four processes.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import litserve
from fastapi import Body

from bench.peers.classifier import Classifier
from bench.peers.setting import Setting

SETTING = Setting.read()


class Classify(litserve.LitAPI):
    """A process with an engine."""

    def setup(self, device: str) -> None:  # noqa: ARG002  # its interface
        """Load the engine."""
        self._classifier = Classifier(SETTING.threads, SETTING.batch)

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> bytes:
        """The body is the JPEG."""
        return request

    def batch(self, inputs: Sequence[bytes]) -> Sequence[bytes]:
        """Images stay as they are until they are computed."""
        return inputs

    def predict(self, x: Any) -> Any:
        """A batch, or where nothing is batched one image."""
        if isinstance(x, bytes):
            return self._classifier.answer([x])[0]
        return self._classifier.answer(x)

    def unbatch(self, output: Any) -> Any:
        """One answer for each image."""
        return output

    def encode_response(self, output: Any) -> Any:
        """An answer is JSON."""
        return output


if __name__ == "__main__":
    api = Classify(max_batch_size=SETTING.batch, batch_timeout=SETTING.wait_ms / 1e3)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=SETTING.workers, fast_queue=True
    )
    server.run(
        host="127.0.0.1",
        port=SETTING.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
