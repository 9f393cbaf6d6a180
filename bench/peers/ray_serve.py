"""Ray Serve: replicas with `serve.batch`, behind the HTTP proxy of the node.

Ray itself is given both cores and no dashboard; a replica has no share of its own, so that two fit
beside the proxy.
"""

import asyncio
import signal
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from bench.peers.classifier import Classifier
from bench.peers.setting import Setting

SETTING = Setting.read()


@serve.deployment(
    num_replicas=SETTING.workers,
    max_ongoing_requests=64,
    ray_actor_options={"num_cpus": 0},
)
class Classify:
    """A process with an engine."""

    def __init__(self) -> None:
        self._classifier = Classifier(SETTING.threads, SETTING.batch)

    @serve.batch(max_batch_size=SETTING.batch, batch_wait_timeout_s=SETTING.wait_ms / 1e3)
    async def answer(self, jpegs: list[bytes]) -> list[dict[str, Any]]:
        """A batch, beside the event loop."""
        return await asyncio.to_thread(self._classifier.answer, jpegs)

    async def __call__(self, request: Request) -> Any:
        """The body is the JPEG."""
        return await self.answer(await request.body())


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": SETTING.port},
        logging_config={"enable_access_log": False},
    )
    deployment: Any = Classify
    serve.run(deployment.bind())
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()
