"""The server with a classifier that answers at once: `python -m bench.null_server`.

All but the forward pass is done, so that its throughput is the most that transports, decoders and
queues allow.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np

from service.cli import main
from service.engine.classification import ClassificationEngine
from service.engine.items import ClassificationInput, ClassificationOutput
from service.processes import birth


def _launch(
    self: ClassificationEngine,
    batch: Sequence[ClassificationInput],
    cores: int | None = None,  # noqa: ARG001
) -> Callable[[], list[ClassificationOutput]]:
    assert self._model is not None
    classes = self._model.config.num_classes
    nothing = ClassificationOutput(
        np.full(classes, 1 / classes, np.float32),
        np.arange(classes, dtype=np.int32),
        logits=np.zeros(classes, np.float32),
    )
    return lambda: [nothing] * len(batch)


if __name__ == "__main__":
    ClassificationEngine.launch = _launch  # type: ignore[method-assign]
    birth.COMMAND = (sys.executable, "-m", "bench.null_server", "child")
    main()
