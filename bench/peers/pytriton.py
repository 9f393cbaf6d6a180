"""PyTriton: the HTTP server and the dynamic batcher of Triton before a function in Python.

The body of a request is the one tensor of bytes that the model takes: a header of Triton's binary
extension says that no JSON comes before it. The answer is text in a tensor.
"""

import json
import os
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from bench.peers.classifier import Classifier
from bench.peers.setting import Setting

SETTING = Setting.read()


def classify(classifier: Classifier) -> Any:
    """A function for one instance of the model."""

    @batch
    def answer(jpeg: Any) -> dict[str, Any]:
        answers = classifier.answer([bytes(row[0]) for row in jpeg])
        return {"answer": np.array([[json.dumps(one).encode()] for one in answers], object)}

    return answer


if __name__ == "__main__":
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=SETTING.port,
        allow_grpc=False,
        allow_metrics=False,
        log_verbose=0,
    )
    engines = [Classifier(SETTING.threads, SETTING.batch) for _ in range(SETTING.workers)]
    with Triton(config=config, workspace=os.environ["TMPDIR"] + "/triton") as triton:
        triton.bind(
            model_name="classify",
            infer_func=[classify(engine) for engine in engines],
            inputs=[Tensor(name="jpeg", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
            config=ModelConfig(
                max_batch_size=SETTING.batch,
                batcher=DynamicBatcher(max_queue_delay_microseconds=1000 * SETTING.wait_ms),
            ),
        )
        triton.serve()
