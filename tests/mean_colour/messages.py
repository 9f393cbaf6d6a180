"""The messages of the task; a real one has a file in `proto/` and generated stubs."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from service.pb import dat_pb2
from service.transport.rpc.messages import of_every_task
from service.transport.rpc.task import RpcTask
from tests.mean_colour.core import MeanColour, MeanColourOptions

_Field = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "mean.v1"
_MESSAGES = {
    "Request": (("images", "bytes*"), ("model", "string"), ("inverted", "bool")),
    "Colour": (
        ("red", "float"), ("green", "float"), ("blue", "float"), ("width", "int32"),
        ("height", "int32"), ("points", ".dat.v1.Points"), ("timing", ".dat.v1.Timing"),
    ),
    "Result": (("colour", ".mean.v1.Colour"), ("error", ".dat.v1.Error")),
    "Response": (("model", "string"), ("version", "string"), ("results", ".mean.v1.Result*")),
    "StreamRequest": (("id", "string"), ("request", ".mean.v1.Request")),
    "StreamResponse": (
        ("id", "string"), ("response", ".mean.v1.Response"), ("error", ".dat.v1.Error"),
    ),
}  # fmt: skip


def _describe() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="mean.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=[dat_pb2.DESCRIPTOR.name],
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            one = message.field.add(name=field, number=number)
            repeated = kind.endswith("*")
            one.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            type_name = kind.removesuffix("*")
            if type_name.startswith("."):
                one.type, one.type_name = _Field.TYPE_MESSAGE, type_name
            else:
                one.type = getattr(_Field, f"TYPE_{type_name.upper()}")
    service = file.service.add(name="MeanColourService")
    for method, asks, answers in (
        ("MeanColour", "Request", "Response"),
        ("MeanColourStream", "StreamRequest", "StreamResponse"),
    ):
        service.method.add(
            name=method,
            input_type=f".{_PACKAGE}.{asks}",
            output_type=f".{_PACKAGE}.{answers}",
            client_streaming=method.endswith("Stream"),
            server_streaming=method.endswith("Stream"),
        )
    return file


descriptor_pool.Default().Add(_describe())


def message(name: str) -> Any:
    """The class of a message."""
    pool = descriptor_pool.Default()
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


def _options(request: Any, remaining_s: float | None) -> MeanColourOptions:
    return MeanColourOptions(
        model=request.model or None, timeout_s=remaining_s, inverted=request.inverted
    )


def _show(answer: MeanColour) -> dict[str, Any]:
    red, green, blue = answer.colour
    fields = of_every_task(answer)
    return {"colour": message("Colour")(red=red, green=green, blue=blue, **fields)}


RPC_MEAN_COLOUR = RpcTask(
    "mean-colour",
    f"{_PACKAGE}.MeanColourService",
    "MeanColour",
    message("Request"),
    _options,
    message("Response"),
    message("Result"),
    _show,
    message("StreamRequest"),
    message("StreamResponse"),
)
