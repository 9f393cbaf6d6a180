"""What each stage of a detector's forward pass takes."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any, TypeVar
from unittest import mock

from model.detection import Detector, roi_heads
from model.detection.roi_heads import TwoStageHead

T = TypeVar("T")

POST_PROCESSING, OTHER = "post-processing", "other"
STAGES = ("backbone", "neck", "heads", "RoIAlign", POST_PROCESSING, OTHER)


class Stopwatch:
    """Gives the time to the stage that runs, the innermost of nested ones.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds = defaultdict[str, float](float)
        self._stage: str | None = None
        self._began = 0.0

    def run(self, stage: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function as part of a stage."""
        outer = self._enter(stage)
        try:
            return function(*args)
        finally:
            self._enter(outer)

    def _enter(self, stage: str | None) -> str | None:
        """Begin a stage and return the one that ran."""
        ended, now = self._stage, perf_counter()
        if ended is not None:
            self.seconds[ended] += now - self._began
        self._stage, self._began = stage, now
        return ended


def time_stages(
    detector: Detector, size: tuple[int, int], forward: Callable[[], T]
) -> tuple[T, dict[str, float]]:
    """Run a forward pass and time its stages.

    RoIAlign is apart from the heads that it feeds. Post-processing is what the heads do beside
    their layers: best entries, boxes from deltas, NMS, scores.

    Args:
        detector: on a CPU, which computes nothing behind one's back.
        size: `(H, W)` of the padded images, pixels.
        forward: runs the detector on images of that size.

    Returns:
        What `forward` returned, and the seconds of each of `STAGES`, which add up to the whole.
    """
    stopwatch = Stopwatch()
    with ExitStack() as patches:
        for stage, owner, name in _entrances(detector, size):
            timed = partial(stopwatch.run, stage, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, timed))
        result: T = stopwatch.run(OTHER, forward)
    return result, {stage: stopwatch.seconds[stage] for stage in STAGES}


def _entrances(detector: Detector, size: tuple[int, int]) -> Iterator[tuple[str, Any, str]]:
    """The functions through which stages are entered: stage, whose, and name."""
    yield "backbone", detector.backbone_for(size), "forward"
    yield "neck", detector.fpn, "forward"
    head = detector.head
    yield POST_PROCESSING, head, "forward"
    yield POST_PROCESSING, head, "find"
    if isinstance(head, TwoStageHead):
        yield "heads", head.rpn, "outputs"
        for part in (*head.box_heads, *head.mask_heads):
            yield "heads", part, "forward"
        yield "RoIAlign", roi_heads, "pooled_features"
    else:
        yield "heads", head, "outputs"
