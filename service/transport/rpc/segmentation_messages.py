"""The messages of segmentation."""

from service.errors import InvalidOption
from service.pb import dat_pb2
from service.tasks.segmentation import (
    Segment,
    SegmentedImage,
    SegmentFormat,
    SegmentOptions,
    TestTime,
)
from service.transport.rpc.masks_messages import mask_message
from service.transport.rpc.messages import (
    box_message,
    colour_message,
    of_every_task,
    options_of_every_task,
)
from service.transport.rpc.task import RpcTask

_FORMATS: dict[int, SegmentFormat] = {
    dat_pb2.SEGMENT_FORMAT_UNSPECIFIED: "png",
    dat_pb2.SEGMENT_FORMAT_PNG: "png",
    dat_pb2.SEGMENT_FORMAT_RLE: "rle",
    dat_pb2.SEGMENT_FORMAT_POLYGON: "polygon",
    dat_pb2.SEGMENT_FORMAT_SUMMARY: "summary",
}
_TEST_TIMES: dict[int, TestTime] = {
    dat_pb2.TEST_TIME_UNSPECIFIED: "official",
    dat_pb2.TEST_TIME_OFFICIAL: "official",
    dat_pb2.TEST_TIME_OFFICIAL_MS: "official_ms",
}


def _options(request: dat_pb2.SegmentRequest, remaining_s: float | None) -> SegmentOptions:
    if request.format not in _FORMATS:
        raise InvalidOption(f"format has no value {request.format}")
    if request.test_time not in _TEST_TIMES:
        raise InvalidOption(f"test_time has no value {request.test_time}")
    return SegmentOptions(
        **options_of_every_task(request, remaining_s),
        format=_FORMATS[request.format],
        classes=tuple(request.classes),
        min_share=request.min_share,
        confidence=request.confidence,
        test_time=_TEST_TIMES[request.test_time],
    )


def _show(answer: SegmentedImage) -> dict[str, dat_pb2.SegmentedImage]:
    input_height, input_width = answer.input_size
    return {
        "image": dat_pb2.SegmentedImage(
            segments=map(_segment, answer.segments),
            label_map=answer.label_map or b"",
            confidence=answer.confidence or b"",
            input_width=input_width,
            input_height=input_height,
            **of_every_task(answer),
        )
    }


def _segment(segment: Segment) -> dat_pb2.Segment:
    return dat_pb2.Segment(
        label=segment.label,
        index=segment.index,
        colour=colour_message(segment.colour),
        share=segment.share,
        box=box_message(segment.box),
        probability=segment.probability,
        **mask_message(segment.mask),
    )


RPC_SEGMENT = RpcTask(
    "segment",
    "dat.v1.SegmenterService",
    "Segment",
    dat_pb2.SegmentRequest,
    _options,
    dat_pb2.SegmentResponse,
    dat_pb2.SegmentResult,
    _show,
    dat_pb2.SegmentStreamRequest,
    dat_pb2.SegmentStreamResponse,
)
