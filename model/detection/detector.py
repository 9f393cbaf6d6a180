"""Detectors: backbone, pyramid and head in one, built by name or from a checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model import checkpoint, openmmlab
from model.attention_weights import AttentionWeights
from model.backbone import Backbone, DenseNetwork
from model.checkpoint import Checkpoint, CheckpointError
from model.detection.config import DETECTORS, DetectorConfig
from model.detection.dense import Candidates
from model.detection.detections import Detections, Found
from model.detection.fpn import DetectorPyramid
from model.detection.official import num_classes, rules
from model.detection.retinanet import RetinaNetHead
from model.detection.roi_heads import TwoStageHead
from model.fused import keep_kernels_channels_last
from model.no_images import of_no_images
from model.official import Rule


class DenseFeatures(NamedTuple):
    """What a detector computes everywhere in its images, before it looks at anything found.

    Attributes:
        levels: of the pyramid, `(B, H, W, channels)`, finest first.
        candidates: the best entries of the dense head.
        sampling_locations: for each of `Detector.deformable_layers`, `(B, G, Hk, Wk, 2)`,
            (y, x), in the coordinates of `model.attention`.
        attention: for each layer that was asked about.
    """

    levels: list[Tensor]
    candidates: Candidates
    sampling_locations: tuple[Tensor, ...]
    attention: tuple[AttentionWeights, ...]


class ExplainedFound(NamedTuple):
    """What was found with the sampling locations of the same forward pass, all on the device.

    Attributes:
        found: in the images of the batch.
        sampling_locations: for each of `Detector.deformable_layers`, `(B, G, Hk, Wk, 2)`,
            (y, x), in the coordinates of `model.attention`.
        attention: for each layer that was asked about.
    """

    found: Found
    sampling_locations: tuple[Tensor, ...]
    attention: tuple[AttentionWeights, ...]


class ExplainedDetections(NamedTuple):
    """Detections with the sampling locations of the same forward pass.

    Attributes:
        detections: of every image.
        sampling_locations: for each of `Detector.deformable_layers`, `(B, G, Hk, Wk, 2)`,
            (y, x), in the coordinates of `model.attention`.
    """

    detections: list[Detections]
    sampling_locations: tuple[Tensor, ...]


class Detector(DenseNetwork):
    """An official detector.

    Its post-processing is part of it: the heads return what was found. Beside the weights, an image
    of 1344x800 takes at most 0.7 GB (0.6 in the tiny models without a cascade): what was measured
    of the process on a CPU in float32.

    Attributes:
        config: what it is made of.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(Backbone(config.backbone, config.first_stage), config.name)
        self.config = config
        self.fpn = DetectorPyramid(config)
        self.head = RetinaNetHead(config) if config.kind == "retinanet" else TwoStageHead(config)
        keep_kernels_channels_last(self)

    def forward(self, images: Tensor, resized_sizes: Tensor, scales_xy: Tensor) -> list[Detections]:
        """Detections of every image; for the arguments see `forward_explained`."""
        return self.forward_explained(images, resized_sizes, scales_xy).detections

    def forward_explained(
        self, images: Tensor, resized_sizes: Tensor, scales_xy: Tensor
    ) -> ExplainedDetections:
        """Detections and sampling locations.

        Args:
            images: `(B, 3, H, W)`, normalised, each padded to multiples of 32 and no further.
            resized_sizes: `(B, 2)`, `(H, W)` of the images without padding, pixels.
            scales_xy: `(B, 2)`, by which the original images were enlarged.

        Raises:
            ValueError: the images are of a size that the backbone cannot take, or not of the type
                or the device of its weights, or sizes and scales are not two numbers for each.
        """
        found, sampling_locations, _ = self.find(images, resized_sizes, scales_xy)
        return ExplainedDetections(found.of_images(), sampling_locations)

    def find(
        self,
        images: Tensor,
        resized_sizes: Tensor,
        scales_xy: Tensor,
        layers: Sequence[int] = (),
        cells: Tensor | None = None,
    ) -> ExplainedFound:
        """What `forward_explained` returns, in fixed shapes on the device of the images.

        For `layers` and `cells`, the attention that is asked for, see `Trunk.stage_maps`. On CUDA
        with the kernels of `model.kernels` it waits for nothing and creates nothing from host
        values, so it can be captured in a CUDA graph once it has run.

        Raises:
            ValueError: as in `forward_explained`.
        """
        pairs = (len(images), 2)
        if resized_sizes.shape != pairs or scales_xy.shape != pairs:
            raise ValueError(
                f"{len(images)} images have sizes and scales {pairs}; got "
                f"{tuple(resized_sizes.shape)} and {tuple(scales_xy.shape)}"
            )
        if not len(images):
            return of_no_images(self.find, images, resized_sizes, scales_xy, layers, cells)
        dense = self.dense(images, resized_sizes, layers, cells)
        found = self.find_in(dense, resized_sizes, scales_xy)
        return ExplainedFound(found, dense.sampling_locations, dense.attention)

    def dense(
        self,
        images: Tensor,
        resized_sizes: Tensor,
        layers: Sequence[int] = (),
        cells: Tensor | None = None,
    ) -> DenseFeatures:
        """The first part of `find`, which depends on no data with or without the kernels.

        Raises:
            ValueError: as in `forward_explained`.
        """
        features = self.backbone_of(images)(images, layers, cells, resized_sizes)
        levels = self.fpn(features.maps)
        candidates = self.head(levels, _limits(resized_sizes, images.dtype))
        return DenseFeatures(levels, candidates, features.sampling_locations, features.attention)

    def find_in(self, dense: DenseFeatures, resized_sizes: Tensor, scales_xy: Tensor) -> Found:
        """The second part of `find`: the search among the candidates, and what follows from it."""
        limits = _limits(resized_sizes, dense.levels[0].dtype)
        return self.head.find(dense.levels, dense.candidates, limits, scales_xy)

    def rules(self) -> Iterator[Rule]:
        """How its weights come from those of an official checkpoint."""
        return rules(self.config)


def _limits(resized_sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """`(B, 2)`, `(x, y)`: width and height of the images without padding."""
    return resized_sizes.flip(-1).to(torch.promote_types(dtype, torch.float32))


def create_detector(name: str, **changes: Any) -> Detector:
    """Build a published detector in evaluation mode, with parameters not yet loaded.

    Args:
        name: a key of `model.detection.config.DETECTORS`.
        **changes: fields of `DetectorConfig` that differ, such as `num_classes`.

    Raises:
        KeyError: no such detector; the message lists those there are.
    """
    if name not in DETECTORS:
        raise KeyError(f"no detector {name!r}; there are {', '.join(DETECTORS)}")
    return Detector(replace(DETECTORS[name], **changes)).eval()


@dataclass(frozen=True)
class LoadedDetector:
    """A detector with the names of its classes.

    Attributes:
        detector: in evaluation mode.
        labels: class names in order of the class index, or `None` if the file has none.
    """

    detector: Detector
    labels: tuple[str, ...] | None


def load_detector(weights: str | Path | Checkpoint, name: str | None = None) -> LoadedDetector:
    """Build the detector that a checkpoint is of, with its weights.

    Args:
        weights: a file, or what `model.checkpoint.read` made of it.
        name: a key of `DETECTORS`; `None` finds it by what the file says, or by the names and
            shapes of the weights.

    Raises:
        CheckpointError: the checkpoint cannot be used; the message names the file, the key and
            the expectation.
    """
    given = weights if isinstance(weights, Checkpoint) else checkpoint.read(weights)
    config = _configure(given, name)
    labels = openmmlab.class_names(given, config.num_classes)
    detector = Detector(config).eval()
    try:
        detector.load_state_dict(given.state)
    except CheckpointError as fault:
        raise CheckpointError(f"{given.path}: {fault}") from fault
    return LoadedDetector(detector, labels)


def _configure(given: Checkpoint, name: str | None) -> DetectorConfig:
    classes = num_classes(openmmlab.parameters(given.state))
    known = {
        config.name: config if classes is None else replace(config, num_classes=classes)
        for config in DETECTORS.values()
    }
    return openmmlab.identify(given, name, known, rules, "detector")
