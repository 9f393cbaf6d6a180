"""What computes a model on a device, as the log and the metrics show it."""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from service.metrics.model import ModelMetrics


@dataclass(frozen=True)
class Computing:
    """A model on a device, loaded.

    Attributes:
        device: its name in the replica.
        hardware: `cpu`, or the name of the GPU and its compute capability.
        backend: what computes: `torch`, `torch.compile` or `openvino`.
        dtype: of the features.
        kernels: `on`, or `off: ` and why.
        tf32: `on` where float32 may be computed as TF32, else `off`.
        graphs: how many CUDA graphs there are.
        weights_bytes: memory of parameters and buffers.
        graphs_bytes: memory of the device that the graphs hold.
        seconds: that loading took.
    """

    device: str
    hardware: str
    backend: str
    dtype: torch.dtype
    kernels: str
    tf32: str
    graphs: int
    weights_bytes: int
    graphs_bytes: int
    seconds: float

    def log_fields(self) -> dict[str, object]:
        """The fields of the line in the log."""
        return {
            **self._labels(),
            "graphs": self.graphs,
            "weights_mb": round(self.weights_bytes / 1e6, 1),
            "graphs_mb": round(self.graphs_bytes / 1e6, 1),
            "seconds": round(self.seconds, 2),
        }

    def show(self, metrics: ModelMetrics) -> None:
        """Have the metrics of the model show it, but for the graphs, which count themselves."""
        metrics.engine_is(self.weights_bytes, **self._labels())

    def _labels(self) -> dict[str, str]:
        return {
            "device": self.device,
            "hardware": self.hardware,
            "backend": self.backend,
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernels": self.kernels,
            "tf32": self.tf32,
        }


def memory_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
