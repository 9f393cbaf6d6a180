"""Requests for pictures: what may be asked for, and what the model has to answer for one."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from model.config import DatConfig
from model.swin_config import SwinConfig
from service.errors import InvalidOption, ServiceError, TooManyImages
from service.metrics.requests import VISUALIZE
from service.settings.model import ResizeMode
from service.tasks.attention import (
    MOST_KEYS,
    AttentionOptions,
    Config,
    Layer,
    check_layers,
    explained_layers,
)
from service.tasks.core import Core, Explain, Options, TaskAnswer, TaskOptions, Upload
from service.tasks.drawing import LEAST_SIZE, MOST_SIZE, Drawing, FileFormat, Layout, Shown
from service.tasks.points import point_layers

_OF_ATTENTION: frozenset[Shown] = frozenset({"attention", "keys"})
_OF_POINTS: frozenset[Shown] = frozenset({"points", "attention", "arrows"})
_OF_LAYERS: frozenset[Shown] = _OF_ATTENTION | _OF_POINTS


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """What a request for a picture may ask for; `attention` has the layers, and whose keys.

    Attributes:
        show: what is drawn over the image; none means what suits the model.
        groups: offset groups that are drawn, from 0, of a Swin heads; none means all.
        opacity: of all that is drawn, from 0 to 1; where segments are shown, of their colours.
            `None` means 1, and `REGIONS_OPACITY` of those.
        size: the larger side of the image in the picture, pixels; `None` means as in the upload,
            within a limit.
        form: of the file.
        layout: whether the plain image stands beside the other.
        score_threshold: least score of an object, of detectors alone; `None` means
            `PICTURED_SCORE`.
        classes: those of the objects or segments that are drawn; none means all.
        resize_mode: how a detector resizes the image; `None` means as its settings say.
    """

    show: tuple[Shown, ...] = ()
    groups: tuple[int, ...] = ()
    opacity: float | None = None
    size: int | None = None
    form: FileFormat = "png"
    layout: Layout = "alone"
    score_threshold: float | None = None
    classes: tuple[str, ...] = ()
    resize_mode: ResizeMode | None = None


PICTURED_SCORE = 0.3
REGIONS_OPACITY = 0.5


class PicturedCore(Core[TaskOptions, TaskAnswer]):
    """Answers requests of a model whose answers can be drawn."""

    @property
    @override
    def tasks(self) -> tuple[str, ...]:
        return (*super().tasks, VISUALIZE)

    @property
    @override
    def explained_layers(self) -> tuple[Layer, ...]:
        return tuple(explained_layers(self.network))

    @property
    @abstractmethod
    def network(self) -> Config:
        """The network whose layers are drawn."""

    @property
    @abstractmethod
    def shown(self) -> tuple[Shown, ...]:
        """What is drawn where a request does not say."""

    @abstractmethod
    def pictured(
        self, asked: PictureOptions, drawing: Drawing, every_task: dict[str, Any]
    ) -> TaskOptions:
        """The options of the task whose answer is drawn.

        Args:
            asked: the request for the picture.
            drawing: the picture.
            every_task: the options that every task has.

        Raises:
            InvalidOption: this model has nothing of that kind to draw.
        """

    async def picture(
        self, uploads: Sequence[Upload], asked: PictureOptions, request_id: str = ""
    ) -> list[TaskAnswer | ServiceError]:
        """Answer for one image, with a picture of the answer.

        Args:
            uploads: the image.
            asked: what is drawn, and how.
            request_id: that its failure is logged with.

        Raises:
            ServiceError: the request cannot be answered; see `service.errors`.
        """
        if len(uploads) > 1:
            raise TooManyImages(
                f"a picture is drawn of one image; the request holds {len(uploads)} images"
            )
        return await self.answer(uploads, self._options(asked), request_id)

    def _options(self, asked: PictureOptions) -> TaskOptions:
        has_points = isinstance(self.network, DatConfig)
        show = frozenset(asked.show or (self.shown if has_points else ("keys",)))
        _check(asked, show)
        of_attention = bool(show & _OF_ATTENTION)
        layers = self._layers(asked, show) if show & _OF_LAYERS else ()
        drawing = Drawing(
            show=tuple(sorted(show)),
            layers=layers,
            groups=asked.groups,
            opacity=_opacity(asked, show),
            size=asked.size,
            form=asked.form,
            layout=asked.layout,
        )
        explain: Explain = "attention" if of_attention else "points" if layers else "none"
        given = asked.attention
        # A window is shown with all of its cells, or as many as can be told.
        top_n = given.top_n if has_points or given.top_n is not None else MOST_KEYS
        attention = AttentionOptions(given.queries, layers, top_n)
        every_task = {
            "model": asked.model,
            "explain": explain,
            "attention": attention if of_attention else AttentionOptions(),
            "timeout_s": asked.timeout_s,
            "priority": asked.priority,
            "drawing": drawing,
        }
        return self.pictured(asked, drawing, every_task)

    def _layers(self, asked: PictureOptions, show: frozenset[Shown]) -> tuple[Layer, ...]:
        """Those that are drawn: as asked, or the last one.

        Raises:
            InvalidOption: a layer, or an offset group of one, is not there.
        """
        name, config = self.card.name, self.network
        if isinstance(config, SwinConfig):
            if without := sorted(show & _OF_POINTS):
                raise InvalidOption(
                    f"{name} attends to windows and has no points, which {without[0]} would show; "
                    "show=keys draws the window of a query"
                )
            known = self.explained_layers
        elif show & _OF_ATTENTION:
            known = self.explained_layers
            if not known:
                raise InvalidOption(f"{name} has no deformable attention to explain")
        else:
            every = point_layers(config, config.image_size)
            known = tuple((layer.stage, layer.block) for layer in every)
            if not known:
                raise InvalidOption(f"{name} has no deformable layers whose points could be drawn")
        check_layers(asked.attention.layers, known, name)
        layers = asked.attention.layers or (known[-1],)
        for stage, block in layers:
            count = _groups(config, stage, block)
            if missing := [group for group in asked.groups if not 0 <= group < count]:
                groups = "heads" if isinstance(config, SwinConfig) else "offset groups"
                raise InvalidOption(
                    f"the layer {stage}.{block} of {name} has {count} {groups}, counted "
                    f"from 0; there is no group {missing[0]}"
                )
        return layers


def _groups(config: Config, stage: int, block: int) -> int:
    if isinstance(config, SwinConfig):
        return config.heads[stage]
    spec = config.stages[stage]
    return spec.offset_groups if spec.blocks[block] == "D" else spec.heads


def _opacity(asked: PictureOptions, show: frozenset[Shown]) -> float:
    if asked.opacity is not None:
        return asked.opacity
    return REGIONS_OPACITY if "segments" in show else 1.0


def _check(asked: PictureOptions, show: frozenset[Shown]) -> None:
    """Refuse options that no model can follow.

    Raises:
        InvalidOption: the message says which and why.
    """
    if len(set(asked.show)) < len(asked.show):
        raise InvalidOption("show names something twice")
    if len(set(asked.groups)) < len(asked.groups):
        raise InvalidOption("groups has a group twice")
    if asked.opacity is not None and not 0 <= asked.opacity <= 1:
        raise InvalidOption(f"opacity must be from 0 to 1, not {asked.opacity}")
    if asked.size is not None and not LEAST_SIZE <= asked.size <= MOST_SIZE:
        raise InvalidOption(
            f"size must be from {LEAST_SIZE} to {MOST_SIZE} pixels, not {asked.size}"
        )
    if (asked.attention.layers or asked.groups) and not show & _OF_LAYERS:
        raise InvalidOption(
            "layers and groups are for points, attention, arrows and keys, none of which is shown"
        )
    if (asked.attention.queries, asked.attention.top_n) != (None, None) and "keys" not in show:
        raise InvalidOption("queries and top_n are for keys, which are not shown: add show=keys")
