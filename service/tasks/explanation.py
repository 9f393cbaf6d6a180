"""What a request asks of a network beside the answer, and what it is told, for an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.config import DatConfig
from service.engine.items import Cells, LayerAttention, Wanted
from service.tasks import attention
from service.tasks.attention import AttendedLayer, Seen
from service.tasks.core import Options
from service.tasks.points import LayerPoints
from service.tasks.points import explained as points_of


class _Output(Protocol):
    @property
    def sampling_locations(self) -> Sequence[NDArray[np.float32]]: ...

    @property
    def attention(self) -> Sequence[LayerAttention]: ...


@dataclass(frozen=True)
class Explanation:
    """Where the network looked; see `service.tasks.core.Answer`."""

    points: tuple[LayerPoints, ...] | None = None
    attention: tuple[AttendedLayer, ...] | None = None


def ask(options: Options, seen: Seen) -> tuple[Wanted, Cells]:
    """What the device is to compute beside the answer.

    Raises:
        InvalidOption: a query lies outside of the image.
    """
    if options.attends:
        return attention.wanted(options.attention, seen)
    return Wanted(points=options.explain != "none"), ()


def tell(options: Options, seen: Seen, output: _Output) -> Explanation:
    """What the device said of it."""
    if options.explain == "none":
        return Explanation()
    assert isinstance(seen.config, DatConfig), "other networks have no points"
    locations = output.sampling_locations
    points = points_of(seen.config, seen.input_size, locations, seen.pixel_map)
    if not options.attends:
        return Explanation(points)
    attended = attention.explained(options.attention, seen, output.attention, points)
    return Explanation(points, attended)
