"""What clients call beside inference: how models are run, what they did, and which are loaded.

Answers are documents with the protocol's own names, which REST shows as they are and gRPC as
messages.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from service.errors import InvalidRequest, quoted
from service.models.card import ModelCard
from service.settings.limits import Limits
from service.tasks.repository import GuardedRepository
from service.tasks.statistics import ModelStatistics, Spent
from service.transport.oip.images import NORMALISED, PIXELS
from service.transport.oip.inference import Inference
from service.transport.oip.task import TensorFacts
from service.transport.oip.tensors import BYTES

Document = dict[str, Any]

EXTENSIONS = ("model_configuration", "statistics")
# Where callers may load and unload.
CONTROL_EXTENSION = "model_repository"
_FORMATS = {PIXELS: "FORMAT_NHWC", NORMALISED: "FORMAT_NCHW"}
# Parameters of a load with which a client would bring a model of its own.
_OVERRIDES = ("config", "file:")
_NOTHING = Spent()


class Control:
    """The models as their operators see them.

    Args:
        inference: the models that are served.
        repository: all models.
        limits: of a request.
    """

    def __init__(self, inference: Inference, repository: GuardedRepository, limits: Limits) -> None:
        self._inference = inference
        self._repository = repository
        self._limits = limits

    @property
    def extensions(self) -> tuple[str, ...]:
        """Of the protocol, that are served by this."""
        return (*EXTENSIONS, CONTROL_EXTENSION) if self._repository.controlled else EXTENSIONS

    def config(self, name: str, version: str = "") -> Document:
        """How a model is run; a `ModelConfig` of the protocol.

        Raises:
            UnknownModel: there is none of that name and version.
            NotReady: the models are still being read.
        """
        core = self._inference.find(name, version)
        card, metadata = core.card, self._inference.metadata(core)
        most = min(card.max_batch, self._limits.max_images)
        sizes = [size for size in card.buckets if size <= most]
        return {
            "name": card.name,
            "platform": metadata.platform,
            "backend": "dat",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": most,
            "input": [
                _tensor(one, format=_FORMATS.get(one.name, "FORMAT_NONE"), optional=True)
                for one in metadata.inputs
            ],
            "output": [_tensor(one) for one in metadata.outputs],
            "instance_group": _instances(card),
            "dynamic_batching": {
                "preferred_batch_size": sizes,
                "max_queue_delay_microseconds": 0,
                "priority_levels": 2,
                "default_priority_level": 1,
            },
            "optimization": {"cuda": _graphs(card, sizes)},
            "parameters": {
                key: {"string_value": value} for key, value in metadata.properties.items()
            },
            "model_transaction_policy": {"decoupled": False},
            "response_cache": {"enable": False},
        }

    async def statistics(self, name: str = "", version: str = "") -> Document:
        """What was done for a model, or for each, since the start; a `ModelStatisticsResponse`.

        Raises:
            UnknownModel: there is none of that name and version.
            NotReady: the models are still being read.
        """
        cores = [self._inference.find(name, version)] if name else self._inference.cores
        versions = {core.card.name: core.card.version for core in cores}
        del cores  # one that is held would be kept in memory
        found = await self._repository.statistics()
        return {
            "model_stats": [
                _statistics(model, of_version, found[model])
                for model, of_version in versions.items()
                if model in found
            ]
        }

    async def index(self, *, ready: bool) -> Sequence[Document]:
        """All models that there are; the `models` of a `RepositoryIndexResponse`.

        Args:
            ready: only those that answer.
        """
        return [
            {"name": one.name, "version": one.version, "state": one.state, "reason": one.reason}
            for one in await self._repository.index()
            if one.state == "READY" or not ready
        ]

    async def load(self, name: str, parameters: Collection[str]) -> None:
        """Load a model of the settings; see `Repository.load`.

        Args:
            name: of the model.
            parameters: names of those that the caller gives; what is not known is ignored.

        Raises:
            InvalidRequest: the caller brings a model of its own.
            ServiceError: it cannot be loaded, or not by this caller.
        """
        for parameter in parameters:
            if parameter.startswith(_OVERRIDES):
                raise InvalidRequest(
                    f"the parameter {quoted(parameter)} is not taken here: models are loaded from "
                    "the files that the settings of the server name"
                )
        await self._repository.load(name)

    async def unload(self, name: str) -> None:
        """Take a model out of service; see `Repository.unload`.

        Raises:
            ServiceError: it cannot be unloaded, or not by this caller.
        """
        await self._repository.unload(name)


def _tensor(facts: TensorFacts, **more: Any) -> Document:
    kind = "TYPE_STRING" if facts.datatype == BYTES else f"TYPE_{facts.datatype}"
    return {"name": facts.name, "data_type": kind, "dims": list(facts.shape[1:]), **more}


def _instances(card: ModelCard) -> list[Document]:
    devices = card.device.split(",")
    gpus = [int(device.partition(":")[2] or 0) for device in devices if device.startswith("cuda")]
    if gpus:
        return [{"name": card.name, "kind": "KIND_GPU", "count": 1, "gpus": gpus}]
    return [{"name": card.name, "kind": "KIND_CPU", "count": len(devices)}]


def _graphs(card: ModelCard, sizes: Sequence[int]) -> Document:
    """The CUDA graphs of a model; where the size of its input changes they follow the images."""
    if not card.device.startswith("cuda"):
        return {"graphs": False}
    specs = [] if card.image_size is None else [{"batch_size": size} for size in sizes]
    return {"graphs": True, "graph_spec": specs}


def _statistics(name: str, version: str, found: ModelStatistics) -> Document:
    return {
        "name": name,
        "version": version,
        "last_inference": found.last_request_ms,
        "inference_count": found.images,
        "execution_count": found.batches,
        "inference_stats": {
            key: _spent(value)
            for key, value in {
                "success": found.success,
                "fail": found.fail,
                "queue": found.queue,
                "compute_input": found.decode,
                "compute_infer": found.compute,
                "compute_output": found.postprocess,
                "cache_hit": _NOTHING,
                "cache_miss": _NOTHING,
            }.items()
        },
        "batch_stats": [_of_size(size, spent) for size, spent in found.sizes.items()],
    }


def _of_size(size: int, spent: Spent) -> Mapping[str, Any]:
    """Of batches of one size; images are decoded and answered one by one, in no batch."""
    return {
        "batch_size": size,
        "compute_input": _spent(_NOTHING),
        "compute_infer": _spent(spent),
        "compute_output": _spent(_NOTHING),
    }


def _spent(spent: Spent) -> Document:
    return {"count": spent.count, "ns": spent.ns}
