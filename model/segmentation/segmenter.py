"""Segmenters: backbone and head in one, built by name or from a checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import checkpoint, openmmlab
from model.attention_weights import AttentionWeights
from model.backbone import Backbone, DenseNetwork
from model.checkpoint import Checkpoint, CheckpointError
from model.fused import keep_kernels_channels_last
from model.no_images import of_no_images
from model.normalise import Normalise
from model.official import Rule
from model.resizing import check_rgb
from model.segmentation.classes import Palette, class_colours, class_names, overlay
from model.segmentation.config import RATIOS, SEGMENTERS, SegmenterConfig
from model.segmentation.labelling import Pass, Segmentation, label_pixels
from model.segmentation.official import nearest, num_classes, rules
from model.segmentation.semantic_fpn import SemanticFpnHead
from model.segmentation.transforms import to_model_pixels
from model.segmentation.upernet import UperNetHead


class ExplainedLogits(NamedTuple):
    """Logits with the sampling locations of the same forward pass.

    Attributes:
        logits: `(B, H, W, num_classes)`, at a quarter of the input's size, rounded up.
        sampling_locations: for each of `Segmenter.deformable_layers`, `(B, G, Hk, Wk, 2)`,
            (y, x), in the coordinates of `model.attention`.
        attention: for each layer that was asked about.
    """

    logits: Tensor
    sampling_locations: tuple[Tensor, ...]
    attention: tuple[AttentionWeights, ...]


class Segmenter(DenseNetwork):
    """An official segmenter, without the resizing of its logits (`model.segmentation.labelling`).

    Attributes:
        config: what it is made of.
    """

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__(Backbone(config.backbone, first_stage=0), config.name)
        self.config = config
        head = SemanticFpnHead if config.kind == "semantic_fpn" else UperNetHead
        self.decode_head = head(config)
        keep_kernels_channels_last(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, h, w, num_classes)`; for the images see `forward_explained`."""
        return self.forward_explained(images).logits

    def forward_explained(
        self, images: Tensor, layers: Sequence[int] = (), cells: Tensor | None = None
    ) -> ExplainedLogits:
        """Logits and sampling locations.

        For `layers` and `cells`, the attention that is asked for, see `Trunk.stage_maps`. With
        given sizes it depends on no data, and on CUDA it can be captured in a graph once it has
        run.

        Args:
            images: `(B, 3, H, W)`, normalised, each without padding.
            layers: whose attention is asked for.
            cells: of whose queries.

        Raises:
            ValueError: the images are of a size that the backbone cannot take, or not of the type
                or the device of its weights.
        """
        if not len(images):
            return of_no_images(self.forward_explained, images, layers, cells)
        features = self.backbone_of(images)(images, layers, cells)
        logits = self.decode_head(features.maps)
        return ExplainedLogits(logits, features.sampling_locations, features.attention)

    def rules(self) -> Iterator[Rule]:
        """How its weights come from those of an official checkpoint."""
        return rules(self.config)


def create_segmenter(name: str, **changes: Any) -> Segmenter:
    """Build a published segmenter in evaluation mode, with parameters not yet loaded.

    Args:
        name: a key of `model.segmentation.config.SEGMENTERS`.
        **changes: fields of `SegmenterConfig` that differ, such as `num_classes`.

    Raises:
        KeyError: no such segmenter; the message lists those there are.
    """
    if name not in SEGMENTERS:
        raise KeyError(f"no segmenter {name!r}; there are {', '.join(SEGMENTERS)}")
    return Segmenter(replace(SEGMENTERS[name], **changes)).eval()


@torch.inference_mode()
def segment(
    segmenter: Segmenter,
    pixels: NDArray[np.uint8],
    *,
    ratios: Sequence[float] = (1.0,),
    mirrored: bool = False,
    confidence: bool = False,
) -> Segmentation:
    """Label every pixel of an image, as the official tests do.

    Args:
        segmenter: in evaluation mode; it computes where its weights are.
        pixels: RGB `(H, W, 3)`, upright.
        ratios: the scales at which the network sees the image, as parts of its own scale. The
            probabilities of all passes are averaged.
        mirrored: whether it sees the image mirrored from left to right, too, at every scale.
        confidence: ask for probabilities and margins of the labels.

    Raises:
        ValueError: the pixels are no such image, or a side of it would be left with 32 pixels or
            less at one of the scales.
    """
    check_rgb(pixels)
    weights = next(segmenter.parameters())
    normalise = Normalise(weights.dtype).to(weights.device)
    height, width = pixels.shape[:2]
    resizings = [segmenter.config.resizing((height, width), ratio) for ratio in ratios]
    inputs = [to_model_pixels(pixels, resizing) for resizing in resizings]
    passes = []
    for of_input, resizing in zip(inputs, resizings, strict=True):
        images = normalise(torch.from_numpy(of_input).to(weights.device).unsqueeze(0))
        for flipped in (False, True) if mirrored else (False,):
            logits = segmenter(images.flip(-1) if flipped else images).squeeze(0).float()
            passes.append(Pass(logits, resizing.resized, flipped))
    return label_pixels(passes, (height, width), confidence=confidence)


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmenter with the names and the colours of its classes.

    Attributes:
        segmenter: in evaluation mode.
        class_names: in order of the class index, or `None` if nobody knows them.
        palette: RGB of each class.
    """

    segmenter: Segmenter
    class_names: tuple[str, ...] | None
    palette: Palette

    def segment(
        self, pixels: NDArray[np.uint8], *, multi_scale: bool = False, confidence: bool = False
    ) -> Segmentation:
        """Label every pixel of an RGB image `(H, W, 3)`, upright.

        Args:
            pixels: of the image.
            multi_scale: as the official tests at several scales do: 12 passes, at six scales from
                a half to 1.75, each plain and mirrored, which take some 20 times as long.
            confidence: ask for probabilities and margins of the labels.

        Raises:
            ValueError: a side would be left with 32 pixels or less at one of the scales.
        """
        return segment(
            self.segmenter,
            pixels,
            ratios=RATIOS if multi_scale else (1.0,),
            mirrored=multi_scale,
            confidence=confidence,
        )

    def overlay(
        self, pixels: NDArray[np.uint8], segmentation: Segmentation, opacity: float = 0.5
    ) -> NDArray[np.uint8]:
        """The colours of the classes over the image `(H, W, 3)`, as mmsegmentation draws them."""
        return overlay(pixels, segmentation.labels.numpy(force=True), self.palette, opacity)


def load_segmenter(weights: str | Path | Checkpoint, name: str | None = None) -> LoadedSegmenter:
    """Build the segmenter that a checkpoint is of, with its weights.

    Args:
        weights: a file, or what `model.checkpoint.read` made of it.
        name: a key of `SEGMENTERS`; `None` finds it by what the file says, or by the names and
            shapes of the weights.

    Raises:
        CheckpointError: the checkpoint cannot be used; the message names the file, the key and
            the expectation.
    """
    given = weights if isinstance(weights, Checkpoint) else checkpoint.read(weights)
    config = _configure(given, name)
    names = class_names(given, config.num_classes)
    palette = class_colours(given, config.num_classes)
    segmenter = Segmenter(config).eval()
    try:
        segmenter.load_state_dict(given.state)
    except CheckpointError as fault:
        raise CheckpointError(f"{given.path}: {fault}") from fault
    return LoadedSegmenter(segmenter, names, palette)


def _configure(given: Checkpoint, name: str | None) -> SegmenterConfig:
    state = openmmlab.parameters(given.state)
    classes = num_classes(state)
    known = {
        config.name: config if classes is None else replace(config, num_classes=classes)
        for config in SEGMENTERS.values()
    }
    if name is None and "variant" not in given.metadata:
        name = nearest(state)
    return openmmlab.identify(given, name, known, rules, "segmenter")
