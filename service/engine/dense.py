"""What the engines of networks share that take images of many sizes: detectors and segmenters."""

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from model.attention_weights import AttentionWeights
from model.backbone import DenseNetwork
from model.cost import flops
from service.engine import bfloat16, gpu
from service.engine.asked import Layers, attention_of, by_layer, flat
from service.engine.computing import Computing, memory_of
from service.engine.device import Device
from service.engine.engine import Engine
from service.engine.graphs import Capture, CudaCapture, Outputs
from service.engine.items import AskingItem, LayerAttention, Wanted
from service.engine.pipeline import Pipeline
from service.engine.slots import Row
from service.metrics.model import ModelMetrics

# A batch gains nothing on a CPU, where one large image keeps all cores busy.
DEFAULT_MAX_BATCH = {"cpu": 1, "cuda": 8}
WARM_UP_SIZE = (320, 320)  # pixels

Size = tuple[int, int]
Network = TypeVar("Network", bound=DenseNetwork)


class DenseEngine(Engine, Generic[Network, Outputs]):
    """Runs batches of equally large images through one such network on a device.

    All that the network computes has one graph for each shape where the device has graphs.

    Args:
        network: its backbone is made anew for every size.
        dtype: of the features; `auto` means `gpu.default_dtype`.
        max_batch: most images in one batch; 0 means `DEFAULT_MAX_BATCH`, or the largest bucket.
        buckets: batch sizes of the graphs; empty means `default_buckets`.
        sizes: sizes of the input `(H, W)` that are made ready by `load`, with a graph for each
            bucket.
        capture: how a graph is captured; `None` means CUDA graphs where there are kernels on CUDA,
            without which a network may wait for what it computed, and none elsewhere.
    """

    def __init__(
        self,
        network: Network,
        device: Device,
        metrics: ModelMetrics,
        *,
        dtype: str = "auto",
        max_batch: int = 0,
        buckets: Sequence[int] = (),
        sizes: Sequence[Size] = (),
        capture: Capture | None = None,
    ) -> None:
        super().__init__(
            device,
            metrics,
            dtype=dtype,
            max_batch=max_batch,
            buckets=buckets,
            default_max_batch=DEFAULT_MAX_BATCH[device.torch_device.type],
        )
        self._network: Network | None = network
        self._sizes = tuple(sizes)
        self._capture = capture
        self._pipeline: Pipeline[Outputs] | None = None

    @abstractmethod
    def _work(self, network: Network, device: torch.device) -> Callable[..., Outputs]:
        """What a `Pipeline` does with the network, which is on the device by now."""

    @abstractmethod
    def _blank_of(self, size: Size) -> Any:
        """An image of one colour whose input has that size."""

    @abstractmethod
    def _row(self, item: Any, layers: Layers = ()) -> Row:
        """What an image gives to each argument of the work."""

    @abstractmethod
    def _select(self, outputs: Outputs, wanted: Wanted) -> list[Tensor]:
        """Those of the outputs of the work that are wanted."""

    @override
    async def settle(self) -> None:
        await self._loaded.settle()

    @override
    def _load(self) -> Generator[None, None, Computing]:
        network = self._network
        assert network is not None, "the model was unloaded: this is a bug"
        device = self._device.torch_device
        began = perf_counter()
        kernels = gpu.kernels_on(device)
        network.cast(self.dtype).to(device).eval()
        work = self._work(network, device)
        built = perf_counter()
        self._metrics.load_seconds["build"].set(built - began)
        if device.type == "cpu":
            bfloat16.advise(self.dtype, flops(network.backbone.config))
        capture = self._capture
        if capture is None and kernels == "on":
            capture = CudaCapture(device)
        pipeline = Pipeline(
            self._device,
            work,
            self.buckets,
            self._metrics,
            capture=capture,
            # The network itself forgets sizes after a while.
            reads=network.backbone_for,
        )
        for size in self._sizes:
            network.backbone_for(size)
        self._pipeline = pipeline
        blanks = [self._row(self._blank_of(size)) for size in self._sizes]
        yield from pipeline.capture_ahead(blanks)
        self._metrics.load_seconds["warmup"].set(perf_counter() - built)
        return Computing(
            device=self._device.name,
            hardware=gpu.describe(device),
            backend="torch",
            dtype=self.dtype,
            kernels=kernels,
            tf32=gpu.tf32(device),
            graphs=len(pipeline),
            weights_bytes=memory_of(network),
            graphs_bytes=pipeline.graphs_bytes,
            seconds=perf_counter() - began,
        )

    @override
    def _warm_ups(self) -> Iterator[Callable[[], object]]:
        blank = self._blank()
        select = partial(self._select, wanted=Wanted(points=True))
        warm_up = partial(self._loaded.warm_up, [self._row(blank)], select)
        yield self._pace.timed(warm_up, self.cost(blank))

    @override
    def _unload(self) -> None:
        if self._pipeline is not None:
            self._pipeline.forget()
        self._pipeline = self._network = None

    @override
    def _blank(self) -> Any:
        # One of the sizes that are ready: another would push one of them out.
        return self._blank_of(min(self._sizes, default=WARM_UP_SIZE))

    @property
    def _loaded(self) -> Pipeline[Outputs]:
        assert self._pipeline is not None, "the model is not loaded: this is a bug"
        return self._pipeline


def beside(
    locations: Sequence[Tensor], attention: Sequence[AttentionWeights], wanted: Wanted
) -> list[Tensor]:
    """Those of the points and the attention of a batch that are wanted, as `Beside` takes them."""
    return [*flat(attention), *(locations if wanted.points else ())]


class Beside:
    """What a batch says beside its answers.

    Args:
        tensors: what `beside` gave, on the host.
        layers: whose attention is among them.
    """

    def __init__(self, tensors: Sequence[Tensor], layers: Layers) -> None:
        end = len(AttentionWeights._fields) * len(layers)
        self._layers = layers
        self._attention = by_layer(tensors[:end])
        self._locations = [layer.numpy() for layer in tensors[end:]]

    def points(self, item: AskingItem, row: int) -> tuple[NDArray[np.float32], ...]:
        """The sampling locations of an image, if it wants them."""
        return tuple(layer[row] for layer in self._locations) if item.wanted.points else ()

    def attention(self, item: AskingItem, row: int) -> tuple[LayerAttention, ...]:
        """The attention that an image wants."""
        return attention_of(item, self._layers, self._attention, row)
