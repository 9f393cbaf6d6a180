"""The device, and how it computes."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from service.settings.group import DAY_S, MOST_THREADS, Group, form

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Backend = Literal["torch", "openvino"]

Devices = Annotated[
    str,
    form(
        r"auto|cuda|cpu(,cpu){0,63}|cuda:[1-9]?[0-9](,cuda:[1-9]?[0-9]){0,63}",
        "auto, cpu, cuda, cuda:N or several, as in cuda:0,cuda:1 or cpu,cpu",
    ),
]


class Engine(Group):
    """The device and how it computes."""

    device: Devices = Field(
        "auto",
        description="`cpu`, `cuda`, `cuda:N`, or `auto`: a GPU if there is one, else a CPU device "
        "on each NUMA node. Several, as in `cuda:0,cuda:1`, each run every model; a batch goes to "
        "the least loaded.",
    )
    dtype: Dtype = Field(
        "auto",
        description="Precision of the features; `auto`: float32 on CPU (the log says whether "
        "bfloat16 is faster), on CUDA bfloat16, or float16 where the GPU only emulates bfloat16.",
    )
    backend: Backend = Field(
        "torch",
        description="What computes classifiers: `torch`, or, on a CPU, `openvino`, an "
        "extra (`pip install -c constraints.txt '.[openvino]'`).",
    )
    kernels: bool = Field(
        True,
        description="Fused kernels on CUDA, where they can be built (a warning says why not); "
        "`false`: plain torch.",
    )
    compile: bool = Field(
        False,
        description="Let `torch.compile` fuse what the graphs of classifiers capture (CUDA): "
        "minutes at the first start.",
    )
    cache: Path | None = Field(
        None,
        description="Folder that keeps compiled code from start to start, so that only the server "
        "may write there; without it the folders of torch and Triton, and none for OpenVINO.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=MOST_THREADS,
        description="CPU threads of one forward pass; 0: one for each core (not for each "
        "hyper-thread), shared by several CPU devices.",
    )
    hang_timeout_s: float = Field(
        0.0,
        ge=0,
        le=DAY_S,
        description="Time after which a batch that does not come back counts as hung and its "
        "device as lost, seconds; 0: twenty times what the slowest batch of the model took for as "
        "many pixels, and at least 30 s (60 s on CUDA).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Engine":
        gpus = [name for name in self.device.split(",") if name.startswith("cuda")]
        if len(set(gpus)) < len(gpus):
            raise ValueError(f"device names a GPU twice: {self.device}")
        return self
