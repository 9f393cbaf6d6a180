"""What is asked and what is answered."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from service.engine.items import Wanted
from service.errors import InvalidOption
from service.images.decode import Empty, Source, decode
from service.tasks.core import Answer, Core, Options
from service.tasks.passage import ImagePassage

SIDE = 8  # of what the device sees, pixels


@dataclass(frozen=True, kw_only=True)
class MeanColourOptions(Options):
    """What a request may ask for: whether the colour is that of the opposite image."""

    inverted: bool = False


@dataclass(frozen=True)
class MeanColourInput:
    """An image on its way to the device, `(8, 8, 3)` RGB bytes."""

    pixels: NDArray[np.uint8]
    wanted: Wanted = field(default_factory=Wanted)

    @property
    def group(self) -> None:
        """All images have one size."""


@dataclass(frozen=True, kw_only=True)
class MeanColour(Answer):
    """The mean `(red, green, blue)` of an image, from 0 to 255."""

    colour: tuple[float, float, float]


class MeanColourCore(Core[MeanColourOptions, MeanColour]):
    """Answers requests for colours."""

    def __init__(self, _config: object, *rest: object, **more: object) -> None:
        super().__init__(*rest, **more)  # type: ignore[arg-type]

    @override
    def check(self, options: MeanColourOptions) -> None:
        if options.explain != "none":
            raise InvalidOption("a mean looks everywhere")

    @override
    async def answer_image(self, passage: ImagePassage, options: MeanColourOptions) -> MeanColour:
        def prepare(data: Source, empty: Empty) -> tuple[NDArray[np.uint8], tuple[int, int]]:
            image = decode(data, self._limits)
            pixels = empty((SIDE, SIDE, 3))
            pixels[...] = np.asarray(image.resize((SIDE, SIDE)))
            return pixels, image.size

        pixels, (width, height) = await passage.decode(prepare)
        colour, timing = await passage.submit(MeanColourInput(pixels))
        show: Callable[[float], float] = (lambda one: 255 - one) if options.inverted else float
        red, green, blue = map(show, colour)
        return MeanColour(
            width=width, height=height, timing=timing, points=None, colour=(red, green, blue)
        )
