"""The tasks that are served here: what of each is asked and answered, over which wire.

Nothing here needs torch, so that a front end can be a process of its own; `computed_tasks.py` has
the other half of each record. `CONTRIBUTING.md` says how to add a task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.tasks.classification import ClassificationCore
from service.tasks.core import AnyCore
from service.tasks.detection import DetectionCore
from service.tasks.segmentation import SegmentationCore
from service.transport.http.classification_schema import HTTP_CLASSIFY
from service.transport.http.detection_schema import HTTP_DETECT
from service.transport.http.segmentation_schema import HTTP_SEGMENT
from service.transport.http.task import HttpTask
from service.transport.oip.classification_tensors import OIP_CLASSIFY
from service.transport.oip.detection_tensors import OIP_DETECT
from service.transport.oip.segmentation_tensors import OIP_SEGMENT
from service.transport.oip.task import OipTask
from service.transport.rpc.classification_messages import RPC_CLASSIFY
from service.transport.rpc.detection_messages import RPC_DETECT
from service.transport.rpc.segmentation_messages import RPC_SEGMENT
from service.transport.rpc.task import RpcTask


@dataclass(frozen=True)
class ServedTask:
    """One task, from its requests to its answers.

    Attributes:
        name: in metrics, in models and in the path of its requests.
        core: what answers its requests.
        http: how it looks over HTTP.
        rpc: how it looks over gRPC.
        oip: how it looks as tensors, in the Open Inference Protocol; `None` means that its models
            are not served there.
        output_bytes: of an output of the device, for each pixel of the image, where outputs grow
            with the image.
    """

    name: str
    core: Callable[..., AnyCore]
    http: HttpTask[Any]
    rpc: RpcTask[Any, Any]
    oip: OipTask[Any, Any] | None = None
    output_bytes: int = 0


DETECT = ServedTask("detect", DetectionCore, HTTP_DETECT, RPC_DETECT, OIP_DETECT)
SEGMENT = ServedTask(
    "segment", SegmentationCore, HTTP_SEGMENT, RPC_SEGMENT, OIP_SEGMENT, output_bytes=2
)
CLASSIFY = ServedTask("classify", ClassificationCore, HTTP_CLASSIFY, RPC_CLASSIFY, OIP_CLASSIFY)

TASKS: tuple[ServedTask, ...] = (DETECT, SEGMENT, CLASSIFY)
