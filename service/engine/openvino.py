"""A classifier compiled by OpenVINO for the CPU, exported from the one that torch runs.

Every image is a request of its own: on a CPU a batch in one request is no faster than as many
requests side by side.
"""

import hashlib
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

import model
from service.engine.classify import Classify, Ranked
from service.engine.device import DeviceUnavailable

_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Of the first comparison with torch in float32. In float32 rounding is a thousandth of it; in
# bfloat16 it moved sampling points by up to 0.046.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2}


def check_available(device: torch.device, dtype: torch.dtype) -> None:
    """Check that OpenVINO can be the backend.

    Raises:
        DeviceUnavailable: it is not installed, or does not support this device or precision.
    """
    if device.type != "cpu" or dtype not in _HINTS:
        raise DeviceUnavailable(
            f"DAT_ENGINE__BACKEND=openvino computes in float32 or bfloat16 on a CPU, not in "
            f"{str(dtype).removeprefix('torch.')} on {device}"
        )
    if find_spec("openvino") is None:
        raise DeviceUnavailable(
            "DAT_ENGINE__BACKEND is openvino, which is not installed; "
            "pip install -c constraints.txt '.[openvino]'"
        )
    if dtype == torch.bfloat16 and not has_bfloat16():
        raise DeviceUnavailable(
            "DAT_ENGINE__DTYPE is bfloat16, for which this CPU has no instructions that OpenVINO "
            "uses; set it to float32"
        )


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU; elsewhere it would ignore the hint."""
    return "BF16" in _import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoClassify:
    """A classifier on a CPU, as a function from bytes to ranked classes.

    For every divisor of the threads the model is compiled for so many images at a time, as far
    as a batch has them; each then has its share of the threads.

    Args:
        classify: on the CPU, in float32, whatever OpenVINO computes in.
        image_size: `(H, W)`, pixels.
        buckets: sizes of the batches that will come.
        threads: of all images together.
        cache: folder that keeps the exported model; `None` exports at every start.
        dtype: that OpenVINO computes in, float32 or bfloat16.

    Raises:
        DeviceUnavailable: OpenVINO is not installed, or does not support this precision.
        RuntimeError: it cannot compile the model, or computes something else than torch.
    """

    def __init__(
        self,
        classify: Classify,
        image_size: tuple[int, int],
        buckets: Sequence[int],
        threads: int,
        cache: Path | None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_available(torch.device("cpu"), dtype)
        runtime = _import_openvino()
        exported = _exported(runtime, classify, image_size, cache)
        self._requests: dict[int, list[Any]] = {}
        for lanes in _lanes(max(buckets), threads):
            compiled = runtime.Core().compile_model(
                exported,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": _HINTS[dtype],
                    "INFERENCE_NUM_THREADS": threads,
                    "NUM_STREAMS": lanes,
                    # Pinned, two devices of a process would compute on the same cores.
                    "ENABLE_CPU_PINNING": False,
                },
            )
            self._requests[lanes] = [compiled.create_infer_request() for _ in range(lanes)]
        self._compare(classify, image_size, TOLERANCES[dtype])

    def __call__(self, pixels: Tensor) -> Ranked:
        """Rank the classes of RGB bytes `(B, H, W, 3)`."""
        images = pixels.numpy()
        results: list[list[Tensor]] = []
        while left := len(images) - len(results):
            lanes = max(lanes for lanes in self._requests if lanes <= left)
            requests = self._requests[lanes]
            for row, request in enumerate(requests, len(results)):
                request.start_async([images[row : row + 1]], share_inputs=True)
            for request in requests:
                request.wait()
                results.append(
                    [torch.from_numpy(output.data.copy()) for output in request.output_tensors]
                )
        scores, classes, logits, *locations = map(torch.cat, zip(*results, strict=True))
        return Ranked(scores, classes, logits, tuple(locations))

    def _compare(self, classify: Classify, image_size: tuple[int, int], tolerance: float) -> None:
        """Run each compilation once, against torch: a runtime has been wrong without a word."""
        random = torch.Generator().manual_seed(0)
        image = torch.randint(256, (1, *image_size, 3), dtype=torch.uint8, generator=random)
        with torch.inference_mode():
            expected = classify(image)
        for lanes in self._requests:
            got = self(image.expand(lanes, -1, -1, -1).contiguous())
            for ours, torchs in zip(_numbers(got), _numbers(expected), strict=True):
                wanted = torchs.expand_as(ours)
                if not torch.allclose(ours, wanted, rtol=0, atol=tolerance, equal_nan=True):
                    raise RuntimeError(
                        f"OpenVINO and torch differ by {(ours - wanted).abs().max():.2g} on the "
                        "same image; use DAT_ENGINE__BACKEND=torch"
                    )


def _numbers(ranked: Ranked) -> tuple[Tensor, ...]:
    return ranked.scores, *ranked.sampling_locations


def _import_openvino() -> Any:
    # This package reports every start and conversion to its maker. Without it nothing is sent.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino  # noqa: PLC0415

    return openvino


def _lanes(images: int, threads: int) -> list[int]:
    """How many images are computed side by side: the divisors of the threads, ascending."""
    return [lanes for lanes in range(1, min(images, threads) + 1) if threads % lanes == 0]


def _exported(
    runtime: Any, classify: Classify, image_size: tuple[int, int], cache: Path | None
) -> Any:
    """The model of OpenVINO for one image, from the cache if it is there."""
    if cache is None:
        return _export(runtime, classify, image_size)
    folder = cache / "openvino"
    file = folder / f"{_key(classify, image_size)}.xml"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        exported = _export(runtime, classify, image_size)
        with TemporaryDirectory(dir=folder) as temporary:
            written = Path(temporary) / file.name
            runtime.save_model(exported, written, compress_to_fp16=False)
            # Weights first: the file that is looked for stands for both.
            for path in (written.with_suffix(".bin"), written):
                path.replace(folder / path.name)
    return runtime.Core().read_model(file)


def _key(classify: Classify, image_size: tuple[int, int]) -> str:
    """What an export depends on, as one hash."""
    digest = hashlib.sha256()
    sources = sorted(Path(model.__file__).parent.glob("*.py"))
    for path in (*sources, Path(sys.modules[Classify.__module__].__file__ or ""), Path(__file__)):
        digest.update(path.read_bytes())
    versions = [version(name) for name in ("torch", "openvino")]
    digest.update(repr((classify.model.config, image_size, versions)).encode())
    for name, tensor in classify.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _export(runtime: Any, classify: Classify, image_size: tuple[int, int]) -> Any:
    image = torch.zeros((1, *image_size, 3), dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        # Torch copies a class of its own that it wants nobody to use.
        warnings.simplefilter("ignore", FutureWarning)
        exported = runtime.convert_model(torch.export.export(classify, (image,)))
    exported.reshape(image.shape)
    _give_convolutions_their_own_input(exported)
    return exported


def _give_convolutions_their_own_input(exported: Any) -> None:
    """Let no transposed input of a convolution be used by another layer as well.

    The CPU plugin of OpenVINO (2026.4) transposes such an input in place, in the memory that the
    attention still reads: the offset network and the attention of the same queries were wrong.
    """
    from openvino import opset15  # noqa: PLC0415

    for node in exported.get_ops():
        if node.get_type_name() not in ("Convolution", "GroupConvolution"):
            continue
        transpose = node.input_value(0).get_node()
        if transpose.get_type_name() != "Transpose":
            continue
        source = transpose.input_value(0)
        if len(source.get_target_inputs()) > 1:
            # The identity, in a form that OpenVINO does not remove.
            own = opset15.maximum(source, np.finfo(np.float32).min)
            transpose.input(0).replace_source_output(own.output(0))
