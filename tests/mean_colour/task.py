"""The record of the task, with how its models are read and computed."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from model.checkpoint import Checkpoint
from service.computed_tasks import ComputedTask, EngineChoice
from service.engine import gpu
from service.engine.computing import Computing, memory_of
from service.engine.device import Device
from service.metrics.model import ModelMetrics
from service.models.card import Label
from service.models.load import Converted, LoadedModel, Loader
from service.served_tasks import ServedTask
from service.settings.model import ModelChoice
from service.share import Share
from tests.mean_colour.core import SIDE, MeanColourCore, MeanColourInput
from tests.mean_colour.messages import RPC_MEAN_COLOUR
from tests.mean_colour.schema import HTTP_MEAN_COLOUR
from tests.mean_colour.tensors import OIP_MEAN_COLOUR

VARIANT = "mean_colour"


class Gain(nn.Module):
    """Each channel times a weight."""

    def __init__(self, gain: torch.Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(B, H, W, 3)` to `(B, 3)`."""
        return pixels.float().mean((1, 2)) * self.gain


class MeanColourEngine:
    """Computes colours on a device."""

    max_batch = 4
    buckets: tuple[int, ...] = (1, 2, 3, 4)
    dtype = torch.float32

    def __init__(self, network: Gain, device: Device, metrics: ModelMetrics) -> None:
        self._network = network
        self._device = device
        self._metrics = metrics

    async def load(self) -> Computing:
        device = self._device.torch_device
        await self._device.run(lambda: self._network.to(device))
        return Computing(
            device=self._device.name,
            hardware=gpu.describe(device),
            backend="torch",
            dtype=self.dtype,
            kernels=gpu.kernels_on(device),
            tf32=gpu.tf32(device),
            graphs=0,
            weights_bytes=memory_of(self._network),
            graphs_bytes=0,
            seconds=0.0,
        )

    async def unload(self) -> None:
        del self._network

    def share(self, in_flight: int, free: int) -> Share:
        return Share(self._device.cores, self.max_batch)

    async def run_batch(
        self,
        batch: Sequence[MeanColourInput],
        cores: int,
    ) -> list[Any]:
        def work() -> list[Any]:
            pixels = torch.stack([torch.from_numpy(item.pixels.copy()) for item in batch])
            with torch.inference_mode():
                colours = self._network(pixels.to(self._device.torch_device))
                return list(colours.cpu().tolist())

        return await self._device.run(work)

    async def settle(self) -> None:
        pass

    async def probe(self, cores: int) -> None:
        blank = torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8).numpy()
        await self.run_batch([MeanColourInput(blank)], cores)

    def describe(self, size: int) -> dict[str, object]:
        return {"model": self._metrics.model, "device": self._device.name, "bucket": size}


def _load(chosen: ModelChoice, checkpoint: Checkpoint, _: str | None) -> LoadedModel:
    return LoadedModel(
        name=chosen.name or VARIANT,
        version=chosen.version,
        task="mean-colour",
        labels=tuple(map(Label, ("red", "green", "blue"))),
        config=SimpleNamespace(name=VARIANT),
        network=Gain(checkpoint.state["gain"]),
        parameters=3,
        source=checkpoint.path,
    )


def _convert(chosen: ModelChoice, checkpoint: Checkpoint) -> Converted:
    network = _load(chosen, checkpoint, None).network
    return Converted(network.state_dict(), {"variant": VARIANT})


def _engine(
    _: LoadedModel, network: Any, device: Device, metrics: ModelMetrics, __: EngineChoice
) -> MeanColourEngine:
    return MeanColourEngine(network, device, metrics)


MEAN_COLOUR = ComputedTask(
    ServedTask("mean-colour", MeanColourCore, HTTP_MEAN_COLOUR, RPC_MEAN_COLOUR, OIP_MEAN_COLOUR),
    Loader(
        "mean-colour",
        (VARIANT,),
        lambda checkpoint: checkpoint.metadata.get("variant") == VARIANT,
        _load,
        _convert,
    ),
    _engine,
)
