from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]

class Explain(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPLAIN_UNSPECIFIED: _ClassVar[Explain]
    EXPLAIN_NONE: _ClassVar[Explain]
    EXPLAIN_POINTS: _ClassVar[Explain]
    EXPLAIN_OBJECTS: _ClassVar[Explain]
    EXPLAIN_ATTENTION: _ClassVar[Explain]

class ResizeMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIZE_MODE_UNSPECIFIED: _ClassVar[ResizeMode]
    RESIZE_MODE_OFFICIAL: _ClassVar[ResizeMode]
    RESIZE_MODE_LETTERBOX: _ClassVar[ResizeMode]

class MaskFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MASK_FORMAT_UNSPECIFIED: _ClassVar[MaskFormat]
    MASK_FORMAT_NONE: _ClassVar[MaskFormat]
    MASK_FORMAT_RLE: _ClassVar[MaskFormat]
    MASK_FORMAT_POLYGON: _ClassVar[MaskFormat]
    MASK_FORMAT_PNG: _ClassVar[MaskFormat]

class SegmentFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEGMENT_FORMAT_UNSPECIFIED: _ClassVar[SegmentFormat]
    SEGMENT_FORMAT_PNG: _ClassVar[SegmentFormat]
    SEGMENT_FORMAT_RLE: _ClassVar[SegmentFormat]
    SEGMENT_FORMAT_POLYGON: _ClassVar[SegmentFormat]
    SEGMENT_FORMAT_SUMMARY: _ClassVar[SegmentFormat]

class TestTime(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TEST_TIME_UNSPECIFIED: _ClassVar[TestTime]
    TEST_TIME_OFFICIAL: _ClassVar[TestTime]
    TEST_TIME_OFFICIAL_MS: _ClassVar[TestTime]

class Shown(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHOWN_UNSPECIFIED: _ClassVar[Shown]
    SHOWN_POINTS: _ClassVar[Shown]
    SHOWN_ATTENTION: _ClassVar[Shown]
    SHOWN_ARROWS: _ClassVar[Shown]
    SHOWN_KEYS: _ClassVar[Shown]
    SHOWN_BOXES: _ClassVar[Shown]
    SHOWN_MASKS: _ClassVar[Shown]
    SHOWN_SEGMENTS: _ClassVar[Shown]

class PictureFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PICTURE_FORMAT_UNSPECIFIED: _ClassVar[PictureFormat]
    PICTURE_FORMAT_PNG: _ClassVar[PictureFormat]
    PICTURE_FORMAT_WEBP: _ClassVar[PictureFormat]
    PICTURE_FORMAT_SVG: _ClassVar[PictureFormat]

class PictureLayout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PICTURE_LAYOUT_UNSPECIFIED: _ClassVar[PictureLayout]
    PICTURE_LAYOUT_ALONE: _ClassVar[PictureLayout]
    PICTURE_LAYOUT_BESIDE: _ClassVar[PictureLayout]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_HIGH: Priority
PRIORITY_LOW: Priority
EXPLAIN_UNSPECIFIED: Explain
EXPLAIN_NONE: Explain
EXPLAIN_POINTS: Explain
EXPLAIN_OBJECTS: Explain
EXPLAIN_ATTENTION: Explain
RESIZE_MODE_UNSPECIFIED: ResizeMode
RESIZE_MODE_OFFICIAL: ResizeMode
RESIZE_MODE_LETTERBOX: ResizeMode
MASK_FORMAT_UNSPECIFIED: MaskFormat
MASK_FORMAT_NONE: MaskFormat
MASK_FORMAT_RLE: MaskFormat
MASK_FORMAT_POLYGON: MaskFormat
MASK_FORMAT_PNG: MaskFormat
SEGMENT_FORMAT_UNSPECIFIED: SegmentFormat
SEGMENT_FORMAT_PNG: SegmentFormat
SEGMENT_FORMAT_RLE: SegmentFormat
SEGMENT_FORMAT_POLYGON: SegmentFormat
SEGMENT_FORMAT_SUMMARY: SegmentFormat
TEST_TIME_UNSPECIFIED: TestTime
TEST_TIME_OFFICIAL: TestTime
TEST_TIME_OFFICIAL_MS: TestTime
SHOWN_UNSPECIFIED: Shown
SHOWN_POINTS: Shown
SHOWN_ATTENTION: Shown
SHOWN_ARROWS: Shown
SHOWN_KEYS: Shown
SHOWN_BOXES: Shown
SHOWN_MASKS: Shown
SHOWN_SEGMENTS: Shown
PICTURE_FORMAT_UNSPECIFIED: PictureFormat
PICTURE_FORMAT_PNG: PictureFormat
PICTURE_FORMAT_WEBP: PictureFormat
PICTURE_FORMAT_SVG: PictureFormat
PICTURE_LAYOUT_UNSPECIFIED: PictureLayout
PICTURE_LAYOUT_ALONE: PictureLayout
PICTURE_LAYOUT_BESIDE: PictureLayout

class ClassifyRequest(_message.Message):
    __slots__ = ("images", "model", "top_k", "explain", "priority", "attention")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    model: str
    top_k: int
    explain: Explain
    priority: Priority
    attention: AttentionOptions
    def __init__(self, images: _Optional[_Iterable[bytes]] = ..., model: _Optional[str] = ..., top_k: _Optional[int] = ..., explain: _Optional[_Union[Explain, str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., attention: _Optional[_Union[AttentionOptions, _Mapping]] = ...) -> None: ...

class AttentionOptions(_message.Message):
    __slots__ = ("queries", "auto", "layers", "top_n")
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOP_N_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[Position]
    auto: bool
    layers: _containers.RepeatedCompositeFieldContainer[LayerName]
    top_n: int
    def __init__(self, queries: _Optional[_Iterable[_Union[Position, _Mapping]]] = ..., auto: _Optional[bool] = ..., layers: _Optional[_Iterable[_Union[LayerName, _Mapping]]] = ..., top_n: _Optional[int] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("x", "y")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    x: float
    y: float
    def __init__(self, x: _Optional[float] = ..., y: _Optional[float] = ...) -> None: ...

class LayerName(_message.Message):
    __slots__ = ("stage", "block")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    stage: int
    block: int
    def __init__(self, stage: _Optional[int] = ..., block: _Optional[int] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("model", "version", "results")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    results: _containers.RepeatedCompositeFieldContainer[ImageResult]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., results: _Optional[_Iterable[_Union[ImageResult, _Mapping]]] = ...) -> None: ...

class ClassifyStreamRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    request: ClassifyRequest
    def __init__(self, id: _Optional[str] = ..., request: _Optional[_Union[ClassifyRequest, _Mapping]] = ...) -> None: ...

class ClassifyStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    response: ClassifyResponse
    error: Error
    def __init__(self, id: _Optional[str] = ..., response: _Optional[_Union[ClassifyResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class ImageResult(_message.Message):
    __slots__ = ("classification", "error")
    CLASSIFICATION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    classification: Classification
    error: Error
    def __init__(self, classification: _Optional[_Union[Classification, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("predictions", "width", "height", "points", "timing", "attention")
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    predictions: _containers.RepeatedCompositeFieldContainer[Prediction]
    width: int
    height: int
    points: Points
    timing: Timing
    attention: Attention
    def __init__(self, predictions: _Optional[_Iterable[_Union[Prediction, _Mapping]]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., points: _Optional[_Union[Points, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., attention: _Optional[_Union[Attention, _Mapping]] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("label", "index", "score", "wnid")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    WNID_FIELD_NUMBER: _ClassVar[int]
    label: str
    index: int
    score: float
    wnid: str
    def __init__(self, label: _Optional[str] = ..., index: _Optional[int] = ..., score: _Optional[float] = ..., wnid: _Optional[str] = ...) -> None: ...

class Points(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[DeformableLayer]
    def __init__(self, layers: _Optional[_Iterable[_Union[DeformableLayer, _Mapping]]] = ...) -> None: ...

class DeformableLayer(_message.Message):
    __slots__ = ("stage", "block", "groups", "rows", "columns", "sampling_locations", "reference_points")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_LOCATIONS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_POINTS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    block: int
    groups: int
    rows: int
    columns: int
    sampling_locations: _containers.RepeatedScalarFieldContainer[float]
    reference_points: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, stage: _Optional[int] = ..., block: _Optional[int] = ..., groups: _Optional[int] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., sampling_locations: _Optional[_Iterable[float]] = ..., reference_points: _Optional[_Iterable[float]] = ...) -> None: ...

class Attention(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[AttentionLayer]
    def __init__(self, layers: _Optional[_Iterable[_Union[AttentionLayer, _Mapping]]] = ...) -> None: ...

class AttentionLayer(_message.Message):
    __slots__ = ("stage", "block", "groups", "rows", "columns", "received", "queries")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    stage: int
    block: int
    groups: int
    rows: int
    columns: int
    received: _containers.RepeatedScalarFieldContainer[float]
    queries: _containers.RepeatedCompositeFieldContainer[AttentionQuery]
    def __init__(self, stage: _Optional[int] = ..., block: _Optional[int] = ..., groups: _Optional[int] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., received: _Optional[_Iterable[float]] = ..., queries: _Optional[_Iterable[_Union[AttentionQuery, _Mapping]]] = ...) -> None: ...

class AttentionQuery(_message.Message):
    __slots__ = ("row", "column", "centre", "group_keys", "group_weights", "group_points", "keys", "weights", "points", "window")
    ROW_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    CENTRE_FIELD_NUMBER: _ClassVar[int]
    GROUP_KEYS_FIELD_NUMBER: _ClassVar[int]
    GROUP_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    GROUP_POINTS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    row: int
    column: int
    centre: Position
    group_keys: _containers.RepeatedScalarFieldContainer[int]
    group_weights: _containers.RepeatedScalarFieldContainer[float]
    group_points: _containers.RepeatedScalarFieldContainer[float]
    keys: _containers.RepeatedScalarFieldContainer[int]
    weights: _containers.RepeatedScalarFieldContainer[float]
    points: _containers.RepeatedScalarFieldContainer[float]
    window: Box
    def __init__(self, row: _Optional[int] = ..., column: _Optional[int] = ..., centre: _Optional[_Union[Position, _Mapping]] = ..., group_keys: _Optional[_Iterable[int]] = ..., group_weights: _Optional[_Iterable[float]] = ..., group_points: _Optional[_Iterable[float]] = ..., keys: _Optional[_Iterable[int]] = ..., weights: _Optional[_Iterable[float]] = ..., points: _Optional[_Iterable[float]] = ..., window: _Optional[_Union[Box, _Mapping]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("decode_s", "queue_s", "compute_s", "batch_size")
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    decode_s: float
    queue_s: float
    compute_s: float
    batch_size: int
    def __init__(self, decode_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., batch_size: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "grpc_code")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    GRPC_CODE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    grpc_code: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., grpc_code: _Optional[int] = ...) -> None: ...

class DetectRequest(_message.Message):
    __slots__ = ("images", "model", "explain", "score_threshold", "max_detections", "classes", "masks", "resize_mode", "priority", "attention")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    SCORE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MAX_DETECTIONS_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    RESIZE_MODE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    model: str
    explain: Explain
    score_threshold: float
    max_detections: int
    classes: _containers.RepeatedScalarFieldContainer[str]
    masks: MaskFormat
    resize_mode: ResizeMode
    priority: Priority
    attention: AttentionOptions
    def __init__(self, images: _Optional[_Iterable[bytes]] = ..., model: _Optional[str] = ..., explain: _Optional[_Union[Explain, str]] = ..., score_threshold: _Optional[float] = ..., max_detections: _Optional[int] = ..., classes: _Optional[_Iterable[str]] = ..., masks: _Optional[_Union[MaskFormat, str]] = ..., resize_mode: _Optional[_Union[ResizeMode, str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., attention: _Optional[_Union[AttentionOptions, _Mapping]] = ...) -> None: ...

class DetectResponse(_message.Message):
    __slots__ = ("model", "version", "results")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    results: _containers.RepeatedCompositeFieldContainer[DetectResult]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., results: _Optional[_Iterable[_Union[DetectResult, _Mapping]]] = ...) -> None: ...

class DetectStreamRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    request: DetectRequest
    def __init__(self, id: _Optional[str] = ..., request: _Optional[_Union[DetectRequest, _Mapping]] = ...) -> None: ...

class DetectStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    response: DetectResponse
    error: Error
    def __init__(self, id: _Optional[str] = ..., response: _Optional[_Union[DetectResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class DetectResult(_message.Message):
    __slots__ = ("image", "error")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    image: DetectedImage
    error: Error
    def __init__(self, image: _Optional[_Union[DetectedImage, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class DetectedImage(_message.Message):
    __slots__ = ("detections", "width", "height", "input_width", "input_height", "points", "timing", "resize_mode", "attention")
    DETECTIONS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INPUT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    INPUT_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    RESIZE_MODE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    detections: _containers.RepeatedCompositeFieldContainer[Detection]
    width: int
    height: int
    input_width: int
    input_height: int
    points: Points
    timing: Timing
    resize_mode: ResizeMode
    attention: Attention
    def __init__(self, detections: _Optional[_Iterable[_Union[Detection, _Mapping]]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., input_width: _Optional[int] = ..., input_height: _Optional[int] = ..., points: _Optional[_Union[Points, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., resize_mode: _Optional[_Union[ResizeMode, str]] = ..., attention: _Optional[_Union[Attention, _Mapping]] = ...) -> None: ...

class Detection(_message.Message):
    __slots__ = ("label", "index", "score", "box", "rle", "polygon", "png", "points_inside")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    RLE_FIELD_NUMBER: _ClassVar[int]
    POLYGON_FIELD_NUMBER: _ClassVar[int]
    PNG_FIELD_NUMBER: _ClassVar[int]
    POINTS_INSIDE_FIELD_NUMBER: _ClassVar[int]
    label: str
    index: int
    score: float
    box: Box
    rle: RunLengths
    polygon: Polygons
    png: PngMask
    points_inside: _containers.RepeatedCompositeFieldContainer[PointsInside]
    def __init__(self, label: _Optional[str] = ..., index: _Optional[int] = ..., score: _Optional[float] = ..., box: _Optional[_Union[Box, _Mapping]] = ..., rle: _Optional[_Union[RunLengths, _Mapping]] = ..., polygon: _Optional[_Union[Polygons, _Mapping]] = ..., png: _Optional[_Union[PngMask, _Mapping]] = ..., points_inside: _Optional[_Iterable[_Union[PointsInside, _Mapping]]] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("x1", "y1", "x2", "y2")
    X1_FIELD_NUMBER: _ClassVar[int]
    Y1_FIELD_NUMBER: _ClassVar[int]
    X2_FIELD_NUMBER: _ClassVar[int]
    Y2_FIELD_NUMBER: _ClassVar[int]
    x1: float
    y1: float
    x2: float
    y2: float
    def __init__(self, x1: _Optional[float] = ..., y1: _Optional[float] = ..., x2: _Optional[float] = ..., y2: _Optional[float] = ...) -> None: ...

class RunLengths(_message.Message):
    __slots__ = ("height", "width", "counts")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    counts: str
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., counts: _Optional[str] = ...) -> None: ...

class Polygons(_message.Message):
    __slots__ = ("rings",)
    RINGS_FIELD_NUMBER: _ClassVar[int]
    rings: _containers.RepeatedCompositeFieldContainer[Ring]
    def __init__(self, rings: _Optional[_Iterable[_Union[Ring, _Mapping]]] = ...) -> None: ...

class Ring(_message.Message):
    __slots__ = ("points",)
    POINTS_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, points: _Optional[_Iterable[int]] = ...) -> None: ...

class PngMask(_message.Message):
    __slots__ = ("png", "left", "top")
    PNG_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    png: bytes
    left: int
    top: int
    def __init__(self, png: _Optional[bytes] = ..., left: _Optional[int] = ..., top: _Optional[int] = ...) -> None: ...

class PointsInside(_message.Message):
    __slots__ = ("stage", "block", "indices")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    stage: int
    block: int
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stage: _Optional[int] = ..., block: _Optional[int] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...

class SegmentRequest(_message.Message):
    __slots__ = ("images", "model", "explain", "format", "classes", "min_share", "confidence", "test_time", "priority", "attention")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    MIN_SHARE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    TEST_TIME_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    model: str
    explain: Explain
    format: SegmentFormat
    classes: _containers.RepeatedScalarFieldContainer[str]
    min_share: float
    confidence: bool
    test_time: TestTime
    priority: Priority
    attention: AttentionOptions
    def __init__(self, images: _Optional[_Iterable[bytes]] = ..., model: _Optional[str] = ..., explain: _Optional[_Union[Explain, str]] = ..., format: _Optional[_Union[SegmentFormat, str]] = ..., classes: _Optional[_Iterable[str]] = ..., min_share: _Optional[float] = ..., confidence: _Optional[bool] = ..., test_time: _Optional[_Union[TestTime, str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., attention: _Optional[_Union[AttentionOptions, _Mapping]] = ...) -> None: ...

class SegmentResponse(_message.Message):
    __slots__ = ("model", "version", "results")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    results: _containers.RepeatedCompositeFieldContainer[SegmentResult]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., results: _Optional[_Iterable[_Union[SegmentResult, _Mapping]]] = ...) -> None: ...

class SegmentStreamRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    request: SegmentRequest
    def __init__(self, id: _Optional[str] = ..., request: _Optional[_Union[SegmentRequest, _Mapping]] = ...) -> None: ...

class SegmentStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    response: SegmentResponse
    error: Error
    def __init__(self, id: _Optional[str] = ..., response: _Optional[_Union[SegmentResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class SegmentResult(_message.Message):
    __slots__ = ("image", "error")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    image: SegmentedImage
    error: Error
    def __init__(self, image: _Optional[_Union[SegmentedImage, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class SegmentedImage(_message.Message):
    __slots__ = ("segments", "width", "height", "input_width", "input_height", "points", "timing", "label_map", "attention", "confidence")
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INPUT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    INPUT_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    LABEL_MAP_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    width: int
    height: int
    input_width: int
    input_height: int
    points: Points
    timing: Timing
    label_map: bytes
    attention: Attention
    confidence: bytes
    def __init__(self, segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., input_width: _Optional[int] = ..., input_height: _Optional[int] = ..., points: _Optional[_Union[Points, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., label_map: _Optional[bytes] = ..., attention: _Optional[_Union[Attention, _Mapping]] = ..., confidence: _Optional[bytes] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("label", "index", "share", "box", "rle", "polygon", "colour", "probability")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    RLE_FIELD_NUMBER: _ClassVar[int]
    POLYGON_FIELD_NUMBER: _ClassVar[int]
    COLOUR_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    label: str
    index: int
    share: float
    box: Box
    rle: RunLengths
    polygon: Polygons
    colour: Colour
    probability: float
    def __init__(self, label: _Optional[str] = ..., index: _Optional[int] = ..., share: _Optional[float] = ..., box: _Optional[_Union[Box, _Mapping]] = ..., rle: _Optional[_Union[RunLengths, _Mapping]] = ..., polygon: _Optional[_Union[Polygons, _Mapping]] = ..., colour: _Optional[_Union[Colour, _Mapping]] = ..., probability: _Optional[float] = ...) -> None: ...

class Colour(_message.Message):
    __slots__ = ("red", "green", "blue")
    RED_FIELD_NUMBER: _ClassVar[int]
    GREEN_FIELD_NUMBER: _ClassVar[int]
    BLUE_FIELD_NUMBER: _ClassVar[int]
    red: int
    green: int
    blue: int
    def __init__(self, red: _Optional[int] = ..., green: _Optional[int] = ..., blue: _Optional[int] = ...) -> None: ...

class VisualizeRequest(_message.Message):
    __slots__ = ("image", "model", "show", "attention", "groups", "opacity", "size", "format", "layout", "score_threshold", "classes", "resize_mode", "priority")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SHOW_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    OPACITY_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SCORE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    RESIZE_MODE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    model: str
    show: _containers.RepeatedScalarFieldContainer[Shown]
    attention: AttentionOptions
    groups: _containers.RepeatedScalarFieldContainer[int]
    opacity: float
    size: int
    format: PictureFormat
    layout: PictureLayout
    score_threshold: float
    classes: _containers.RepeatedScalarFieldContainer[str]
    resize_mode: ResizeMode
    priority: Priority
    def __init__(self, image: _Optional[bytes] = ..., model: _Optional[str] = ..., show: _Optional[_Iterable[_Union[Shown, str]]] = ..., attention: _Optional[_Union[AttentionOptions, _Mapping]] = ..., groups: _Optional[_Iterable[int]] = ..., opacity: _Optional[float] = ..., size: _Optional[int] = ..., format: _Optional[_Union[PictureFormat, str]] = ..., layout: _Optional[_Union[PictureLayout, str]] = ..., score_threshold: _Optional[float] = ..., classes: _Optional[_Iterable[str]] = ..., resize_mode: _Optional[_Union[ResizeMode, str]] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class VisualizeResponse(_message.Message):
    __slots__ = ("model", "version", "picture", "media_type", "width", "height", "timing", "render_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    RENDER_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    picture: bytes
    media_type: str
    width: int
    height: int
    timing: Timing
    render_s: float
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., picture: _Optional[bytes] = ..., media_type: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., render_s: _Optional[float] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "labels")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    model: Model
    labels: _containers.RepeatedCompositeFieldContainer[Label]
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., labels: _Optional[_Iterable[_Union[Label, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "default", "task", "variant", "width", "height", "classes", "parameters", "flops", "device", "dtype", "max_batch", "resize_mode", "letterbox_size", "explained_layers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    RESIZE_MODE_FIELD_NUMBER: _ClassVar[int]
    LETTERBOX_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPLAINED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    default: bool
    task: str
    variant: str
    width: int
    height: int
    classes: int
    parameters: int
    flops: int
    device: str
    dtype: str
    max_batch: int
    resize_mode: ResizeMode
    letterbox_size: int
    explained_layers: _containers.RepeatedCompositeFieldContainer[LayerName]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., default: _Optional[bool] = ..., task: _Optional[str] = ..., variant: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., classes: _Optional[int] = ..., parameters: _Optional[int] = ..., flops: _Optional[int] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., max_batch: _Optional[int] = ..., resize_mode: _Optional[_Union[ResizeMode, str]] = ..., letterbox_size: _Optional[int] = ..., explained_layers: _Optional[_Iterable[_Union[LayerName, _Mapping]]] = ...) -> None: ...

class Label(_message.Message):
    __slots__ = ("name", "wnid", "colour")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WNID_FIELD_NUMBER: _ClassVar[int]
    COLOUR_FIELD_NUMBER: _ClassVar[int]
    name: str
    wnid: str
    colour: Colour
    def __init__(self, name: _Optional[str] = ..., wnid: _Optional[str] = ..., colour: _Optional[_Union[Colour, _Mapping]] = ...) -> None: ...
