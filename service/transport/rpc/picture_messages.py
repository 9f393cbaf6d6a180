"""The messages of pictures."""

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from service.errors import InvalidOption
from service.metrics.requests import VISUALIZE
from service.models.card import ModelCard
from service.pb import dat_pb2
from service.tasks.core import AnyCore
from service.tasks.drawing import FileFormat, Layout, Shown
from service.tasks.pictures import PicturedCore, PictureOptions
from service.transport.rpc.messages import common_options, resize_mode_of, timing_message

_SHOWN: dict[int, Shown] = {
    dat_pb2.SHOWN_POINTS: "points",
    dat_pb2.SHOWN_ATTENTION: "attention",
    dat_pb2.SHOWN_ARROWS: "arrows",
    dat_pb2.SHOWN_KEYS: "keys",
    dat_pb2.SHOWN_BOXES: "boxes",
    dat_pb2.SHOWN_MASKS: "masks",
    dat_pb2.SHOWN_SEGMENTS: "segments",
}
_FORMATS: dict[int, FileFormat] = {
    dat_pb2.PICTURE_FORMAT_UNSPECIFIED: "png",
    dat_pb2.PICTURE_FORMAT_PNG: "png",
    dat_pb2.PICTURE_FORMAT_WEBP: "webp",
    dat_pb2.PICTURE_FORMAT_SVG: "svg",
}
_LAYOUTS: dict[int, Layout] = {
    dat_pb2.PICTURE_LAYOUT_UNSPECIFIED: "alone",
    dat_pb2.PICTURE_LAYOUT_ALONE: "alone",
    dat_pb2.PICTURE_LAYOUT_BESIDE: "beside",
}


class RpcPictures:
    """How requests for pictures look over gRPC; see `RpcCall`."""

    name = VISUALIZE
    service = "dat.v1.VisualizerService"
    method = "Visualize"
    request: type[Message] = dat_pb2.VisualizeRequest

    def options(
        self, request: dat_pb2.VisualizeRequest, remaining_s: float | None, /
    ) -> PictureOptions:
        """What a request asks for, and the seconds left for it.

        Raises:
            InvalidOption: an enumeration has no such value.
        """
        if unknown := [value for value in request.show if value not in _SHOWN]:
            raise InvalidOption(f"show has no value {unknown[0]}")
        if request.format not in _FORMATS:
            raise InvalidOption(f"format has no value {request.format}")
        if request.layout not in _LAYOUTS:
            raise InvalidOption(f"layout has no value {request.layout}")
        given = {
            name: getattr(request, name)
            for name in ("opacity", "size", "score_threshold")
            if request.HasField(name)
        }
        return PictureOptions(
            **common_options(request, remaining_s),
            show=tuple(_SHOWN[value] for value in request.show),
            groups=tuple(request.groups),
            form=_FORMATS[request.format],
            layout=_LAYOUTS[request.layout],
            classes=tuple(request.classes),
            resize_mode=resize_mode_of(request.resize_mode),
            **given,
        )

    async def work(
        self, core: AnyCore, images: Sequence[bytes], options: PictureOptions, identity: str
    ) -> list[Any]:
        """The answer for the image, with its picture."""
        assert isinstance(core, PicturedCore), "no other core has this task"
        return await core.picture(images, options, identity)

    def answer(self, card: ModelCard, outcomes: list[Any]) -> Message:
        """The message that answers a request."""
        (answer,) = outcomes
        picture = answer.picture
        return dat_pb2.VisualizeResponse(
            model=card.name,
            version=card.version,
            picture=picture.data,
            media_type=picture.media_type,
            width=picture.width,
            height=picture.height,
            timing=timing_message(answer.timing),
            render_s=picture.render_s,
        )


RPC_VISUALIZE = RpcPictures()
