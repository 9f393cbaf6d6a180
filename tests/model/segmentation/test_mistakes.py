"""Plausible mistakes made on purpose: the golden cases have to notice every one.

The table says of how many pixels each mistake changes the label, in the golden case of SemanticFPN
and in that of UPerNet. The numbers were measured on another implementation of the official code,
which shares nothing with ours. That ours changes as many shows that a patch makes the mistake it is
named after, and that the two agree off the beaten path as well.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model import feature_pyramid, normalise, openmmlab
from model.backbone import Backbone, Features
from model.fused import convolve, linear
from model.official import apply
from model.segmentation import fusion, labelling, segment, semantic_fpn, upernet
from model.segmentation import segmenter as segmenting
from model.segmentation.labelling import Segmentation, _Axis, label_pixels
from model.segmentation.official import head_rules
from model.segmentation.resize import resized
from model.segmentation.semantic_fpn import Branch
from model.segmentation.transforms import Resizing, to_model_pixels
from model.segmentation.upernet import PyramidPooling, UperNetHead
from tests.conftest import GOLDEN
from tests.model.segmentation.conftest import Case, read_case
from tests.model.segmentation.test_golden import DIFFERENT_PIXELS

pytestmark = pytest.mark.slow

Make = Callable[[pytest.MonkeyPatch, Case], None]


@cache
def case_of(name: str) -> Case:
    return read_case(GOLDEN / "seg" / f"{name}.npz")


@cache
def features_of(name: str) -> Features:
    """What the backbone sees in the picture of a case, without any mistake."""
    seen: list[Features] = []
    case, right = case_of(name), Backbone.forward

    def kept(*given: Any) -> Features:
        seen.append(right(*given))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "forward", kept)
        segment(case.segmenter, case.pixels)
    return seen[0]


def function(module: Any, name: str, wrong: Callable[..., Any]) -> Make:
    """A function of a module is `wrong(the right one, what it is given...)`."""

    def make(patch: pytest.MonkeyPatch, _: Case) -> None:
        right = getattr(module, name)
        patch.setattr(module, name, lambda *given, **named: wrong(right, *given, **named))

    return make


def both(*made: Make) -> Make:
    def make(patch: pytest.MonkeyPatch, case: Case) -> None:
        for one in made:
            one(patch, case)

    return make


def resized_first(patch: pytest.MonkeyPatch, _: Case) -> None:
    """The levels of UPerNet are resized and then convolved, which is no mistake."""
    patch.setattr(fusion, "fuses", lambda _: False)


def pixels(wrong: Callable[[np.ndarray, Resizing], np.ndarray]) -> Make:
    """The input is `wrong(picture, resizing)`, bytes or not."""
    return function(segmenting, "to_model_pixels", lambda _, *given: wrong(*given))


def reversed_colours(picture: np.ndarray, resizing: Resizing) -> np.ndarray:
    return np.ascontiguousarray(to_model_pixels(picture, resizing)[..., ::-1])


def antialiased(picture: np.ndarray, resizing: Resizing) -> np.ndarray:
    size = resizing.resized[::-1]
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))


def in_float(picture: np.ndarray, resizing: Resizing) -> np.ndarray:
    size = resizing.resized[::-1]
    return cv2.resize(picture.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)


def mirrored(picture: np.ndarray, resizing: Resizing) -> np.ndarray:
    return np.ascontiguousarray(to_model_pixels(picture, resizing)[:, ::-1])


def size(wrong: Callable[[Resizing], tuple[int, int]]) -> Make:
    """The picture is resized to `wrong(resizing)`."""
    return lambda patch, _: patch.setattr(Resizing, "resized", property(wrong))


def rounded_down(resizing: Resizing) -> tuple[int, int]:
    height, width = resizing.image_size
    factor = min(
        resizing.long_side / max(resizing.image_size),
        resizing.short_side / min(resizing.image_size),
    )
    return int(height * factor), int(width * factor)


def not_enlarged(resizing: Resizing) -> tuple[int, int]:
    return min(rounded_half_up(resizing), resizing.image_size)


def rounded_half_up(resizing: Resizing) -> tuple[int, int]:
    height, width = resizing.image_size
    factor = min(
        resizing.long_side / max(resizing.image_size),
        resizing.short_side / min(resizing.image_size),
    )
    return int(height * factor + 0.5), int(width * factor + 0.5)


def padded(patch: pytest.MonkeyPatch, case: Case) -> None:
    """Zeros are added up to multiples of 32, and the logits are not cut."""
    right = segmenting.Segmenter.forward

    def wrong(segmenter: segmenting.Segmenter, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        return right(segmenter, F.pad(images, (0, -width % 32, 0, -height % 32)))

    patch.setattr(segmenting.Segmenter, "forward", wrong)
    passes(not_cut)(patch, case)


def without_norms(patch: pytest.MonkeyPatch, case: Case) -> None:
    view = case.segmenter.backbone_for(
        case.segmenter.config.resizing(case.pixels.shape[:2]).resized
    )
    patch.setitem(
        view._modules, "norms", torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    )


def smaller_eps(patch: pytest.MonkeyPatch, _: Case) -> None:
    right = F.layer_norm
    patch.setattr(
        F, "layer_norm", lambda x, shape, scale, shift, _: right(x, shape, scale, shift, 1e-6)
    )


def weights(wrong: Callable[[str, Tensor], Tensor]) -> Make:
    """The official weights of the head are `wrong(name, value)`."""

    def make(patch: pytest.MonkeyPatch, case: Case) -> None:
        segmenter = case.segmenter
        state = {key: wrong(key, torch.from_numpy(value)) for key, value in case.state.items()}
        head = type(segmenter.decode_head)(segmenter.config).eval()
        folded = apply(head_rules(segmenter.config), state)
        head.load_state_dict(
            {key.removeprefix("decode_head."): value.float() for key, value in folded.items()}
        )
        patch.setitem(segmenter._modules, "decode_head", head)

    return make


def larger_eps(patch: pytest.MonkeyPatch, case: Case) -> None:
    patch.setattr(openmmlab, "_NORM_EPSILON", 1e-3)
    weights(lambda _, value: value)(patch, case)


def no_norm(name: str, value: Tensor) -> Tensor:
    if name.endswith((".bn.weight", ".bn.running_var")):
        return torch.ones_like(value)
    return torch.zeros_like(value) if ".bn." in name else value


def at_corners(_: object, tokens: Tensor, size: Any) -> Tensor:
    maps = F.interpolate(tokens.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=True)
    return maps.permute(0, 2, 3, 1)


def nearest(tokens: Tensor, size: Any, mode: str = "nearest") -> Tensor:
    maps = F.interpolate(tokens.permute(0, 3, 1, 2), tuple(size), mode=mode)
    return maps.permute(0, 2, 3, 1)


def bilinear_top_down(_: object, tokens: Tensor, like: Tensor) -> Tensor:
    return resized(tokens, like.shape[1:3])


def nearest_top_down(patch: pytest.MonkeyPatch, _: Case) -> None:
    """The calls of UPerNet's head are four for the pooled maps, three top-down, four at last."""
    calls = iter(range(11))
    patch.setattr(
        upernet,
        "resized",
        lambda *given: nearest(*given) if 4 <= next(calls) < 7 else resized(*given),
    )


def nearest_pooled(patch: pytest.MonkeyPatch, _: Case) -> None:
    calls = iter(range(11))
    patch.setattr(
        upernet, "resized", lambda *given: nearest(*given) if next(calls) < 4 else resized(*given)
    )


def without_relu(_: object, layer: Any, tokens: Tensor, __: str) -> Tensor:
    return (linear if isinstance(layer, torch.nn.Linear) else convolve)(layer, tokens)


def relu_in_the_pyramid(_: object, layer: Any, tokens: Tensor) -> Tensor:
    return convolve(layer, tokens, "relu")


def branch(wrong: Callable[[Branch, Tensor], Tensor]) -> Make:
    return lambda patch, _: patch.setattr(Branch, "forward", wrong)


def doubled_before(branch: Branch, tokens: Tensor) -> Tensor:
    for convolution in branch:
        if branch.grows:
            height, width = tokens.shape[1:3]
            tokens = resized(tokens, (2 * height, 2 * width))
        tokens = convolve(convolution, tokens, "relu")
    return tokens


def never_doubled(branch: Branch, tokens: Tensor) -> Tensor:
    for convolution in branch:
        tokens = convolve(convolution, tokens, "relu")
    return tokens


def cut(right: Callable[..., Tensor], tokens: Tensor, size: Any) -> Tensor:
    """What is shrunk, the levels that were doubled, is cut."""
    height, width = size
    if height <= tokens.shape[1] and width <= tokens.shape[2]:
        return tokens[:, :height, :width]
    return right(tokens, size)


def mean_of_levels(patch: pytest.MonkeyPatch, case: Case) -> None:
    classes = case.segmenter.decode_head.classes
    patch.setattr(
        classes, "forward", lambda tokens: F.linear(tokens / 4, classes.weight, classes.bias)
    )


def bins(reduce: Callable[[Tensor], Tensor], ends: Callable[[int, int, int], int]) -> Make:
    """Bins are reduced so, and end before `ends(index, cells, bins)`."""

    def wrong(_: object, tokens: Tensor, side: int) -> Tensor:
        _, height, width, channels = tokens.shape
        pooled = torch.zeros(1, side, side, channels)
        for row in range(side):
            rows = slice(
                row * height // side, max(ends(row, height, side), row * height // side + 1)
            )
            for column in range(side):
                start = column * width // side
                columns = slice(start, max(ends(column, width, side), start + 1))
                pooled[0, row, column] = reduce(tokens[0, rows, columns].flatten(0, 1))
        return pooled

    return function(upernet, "mean_pooled", wrong)


def rounded_up(index: int, cells: int, count: int) -> int:
    return -(-(index + 1) * cells // count)


def not_overlapping(index: int, cells: int, count: int) -> int:
    return (index + 1) * cells // count


def largest(cells: Tensor) -> Tensor:
    return cells.amax(0)


def together(order: Callable[[Tensor, list[Tensor]], list[Tensor]]) -> Make:
    """The map and what was pooled are concatenated in another order."""

    def wrong(pooling: PyramidPooling, tokens: Tensor) -> Tensor:
        ordered = torch.cat(order(tokens, pooling.pooled(tokens)), -1)
        return convolve(pooling.bottleneck, ordered, "relu")

    return lambda patch, _: patch.setattr(PyramidPooling, "forward", wrong)


def upernet_head(
    *, summed: bool = True, order: Callable[[list[Tensor]], list[Tensor]] = lambda levels: levels
) -> Make:
    """The pyramid of UPerNet adds what is not summed yet, or is concatenated in another order."""

    def wrong(head: UperNetHead, maps: list[Tensor]) -> Tensor:
        laterals = [
            linear(lateral, tokens, "relu")
            for lateral, tokens in zip(head.laterals, maps[:-1], strict=True)
        ]
        merged = [*laterals, head.pooling(maps[-1])]
        alone = list(merged)
        for level in (2, 1, 0):
            coarser = (merged if summed else alone)[level + 1]
            merged[level] = merged[level] + resized(coarser, merged[level].shape[1:3])
        levels = [convolve(*pair, "relu") for pair in zip(head.outputs, merged[:-1], strict=True)]
        at_finest = [resized(tokens, levels[0].shape[1:3]) for tokens in (*levels, merged[-1])]
        fused = convolve(head.fusion, torch.cat(order(at_finest), -1), "relu")
        return F.linear(fused, head.classes.weight, head.classes.bias)

    return lambda patch, _: patch.setattr(UperNetHead, "forward", wrong)


def axis(wrong: Callable[[int, int], Tensor]) -> Make:
    """The cells of a resized axis are at `wrong(size, resized)` in the last two resizings."""

    def resizing(size: int, resized: int) -> _Axis:
        at = wrong(size, resized).clamp(0, size - 1)
        first = at.long()
        return _Axis(first, (first + 1).clamp(max=size - 1), at - first)

    return lambda patch, _: patch.setattr(_Axis, "resizing", staticmethod(resizing))


def corners_of_pixels(size: int, resized: int) -> Tensor:
    return torch.arange(resized) * ((size - 1) / (resized - 1))


def nearest_pixels(size: int, resized: int) -> Tensor:
    return (torch.arange(resized) * size // resized).float()


def passes(wrong: Callable[..., Segmentation]) -> Make:
    """Labels are `wrong(passes, image_size)`."""
    return function(segmenting, "label_pixels", lambda _, *given, **__: wrong(*given))


def not_cut(passes: Any, size: tuple[int, int]) -> Segmentation:
    """The size of the input is that of the padded one, whose sides are multiples of four."""
    whole = [
        one._replace(input_size=tuple(4 * side for side in one.logits.shape[:2])) for one in passes
    ]
    return label_pixels(whole, size)


def one_resizing(passes: Any, size: tuple[int, int]) -> Segmentation:
    direct = [one._replace(input_size=tuple(one.logits.shape[:2])) for one in passes]
    return label_pixels(direct, size)


def probabilities_resized(passes: Any, size: tuple[int, int]) -> Segmentation:
    return label_pixels([one._replace(logits=one.logits.softmax(-1)) for one in passes], size)


def labels_of_cells(passes: Any, size: tuple[int, int]) -> Segmentation:
    (one,) = passes
    return labels_enlarged(one.logits.argmax(-1), size)


def labels_of_input(passes: Any, size: tuple[int, int]) -> Segmentation:
    (one,) = passes
    return labels_enlarged(label_pixels(passes, one.input_size).labels, size)


def labels_enlarged(labels: Tensor, size: tuple[int, int]) -> Segmentation:
    return Segmentation(F.interpolate(labels[None, None].float(), size)[0, 0].to(torch.uint8))


def numbered_from_one(passes: Any, size: tuple[int, int]) -> Segmentation:
    return Segmentation(label_pixels(passes, size).labels + 1)


# What is wrong, of how many pixels it changes the label in the case of SemanticFPN and in that of
# UPerNet (`None`: it is no mistake there), and the patch. First what the backbone sees.
INPUTS: tuple[tuple[str, float | None, float | None, Make], ...] = (
    ("BGR", 0.955544, 0.961824, pixels(reversed_colours)),
    ("Pillow's filter, antialiased", 0.1957, 0.015155, pixels(antialiased)),
    ("resized without rounding", 0.02333, 0.011315,
     both(pixels(in_float), function(normalise, "check_bytes", lambda *_: None))),
    ("size rounded down", 0.332926, 0.200958, size(rounded_down)),
    ("not enlarged", None, 0.721182, size(not_enlarged)),
    ("mirrored", 0.960669, 0.86088, pixels(mirrored)),
    ("padded to multiples of 32", 0.812523, 0.816489, padded),
    ("outputs of the backbone not normed", 0.999747, 0.923503, without_norms),
    ("LayerNorm: eps of 1e-6", 0.012187, 0.004109, smaller_eps),
)  # fmt: skip
HEADS: tuple[tuple[str, float | None, float | None, Make], ...] = (
    ("BatchNorm: eps of 1e-3", 0.000939, 0.004171, larger_eps),
    ("BatchNorm left out", 0.513863, 0.723474, weights(no_norm)),
    ("align_corners in the head", 0.365866, 0.409721,
     both(function(semantic_fpn, "resized", at_corners), function(upernet, "resized", at_corners),
          resized_first, function(fusion, "resized", at_corners))),
    ("no ReLU", 0.882455, 0.977206,
     both(function(semantic_fpn, "convolve", without_relu),
          function(upernet, "convolve", without_relu), function(upernet, "linear", without_relu),
          resized_first, function(fusion, "convolve", without_relu))),
    ("top-down: bilinear in SemanticFPN", 0.250048, None,
     function(feature_pyramid, "upsampled", bilinear_top_down)),
    ("top-down: nearest in UPerNet", None, 0.333698, nearest_top_down),
    ("top-down: nearest centre", 0.148995, None,
     function(feature_pyramid, "upsampled",
              lambda _, tokens, like: nearest(tokens, like.shape[1:3], "nearest-exact"))),
    ("pyramid: ReLU", 0.774071, None, function(feature_pyramid, "convolve", relu_in_the_pyramid)),
    ("levels doubled before the convolution", 0.614439, None, branch(doubled_before)),
    ("levels not doubled", 0.758846, None, branch(never_doubled)),
    ("levels cut", 0.25127, None, function(semantic_fpn, "resized", cut)),
    ("mean of the levels", 0.897084, None, mean_of_levels),
    ("pooling: 1, 2, 3 and 4 bins", None, 0.095926,
     lambda patch, _: patch.setattr(upernet, "POOLED_SIDES", (1, 2, 3, 4))),
    ("pooling: bins do not overlap", None, 0.150104,
     bins(lambda cells: cells.mean(0), not_overlapping)),
    ("pooling: largest", None, 0.553466, bins(largest, rounded_up)),
    ("pooling: back by the nearest", None, 0.134557, nearest_pooled),
    ("pooling: before the map", None, 0.989305, together(lambda tokens, pooled: [*pooled, tokens])),
    ("pooling: most bins first", None, 0.994384,
     together(lambda tokens, pooled: [tokens, *pooled[::-1]])),
    ("top-down: not summed", None, 0.936613, upernet_head(summed=False)),
    ("levels from coarse to fine", None, 0.995354, upernet_head(order=lambda levels: levels[::-1])),
    ("pixels: align_corners", 0.159975, 0.128796, axis(corners_of_pixels)),
    ("pixels: nearest", 0.227001, 0.214688, axis(nearest_pixels)),
    ("pixels: one resizing", 0.0087, 0.008197, passes(one_resizing)),
    ("pixels: probabilities resized", 0.063957, 0.06446, passes(probabilities_resized)),
    ("pixels: labels of cells", 0.211358, 0.193546, passes(labels_of_cells)),
    ("pixels: labels of the input", 0.071511, 0.090496, passes(labels_of_input)),
    ("labels from 1", 1.0, 1.0, passes(numbered_from_one)),
)  # fmt: skip


def cases(mistakes: Any) -> list[Any]:
    return [
        pytest.param(case, share, make, id=f"{case}-{name}")
        for name, *shares, make in mistakes
        for case, share in zip(("fpn_tiny", "upn_tiny"), shares, strict=True)
        if share is not None
    ]


def share_of_other_labels(case: Case) -> float:
    labels = segment(case.segmenter, case.pixels).labels.numpy()
    return float((labels != case.golden["labels"]).mean())


@pytest.mark.parametrize(("name", "share", "make"), cases(HEADS))
def test_a_mistake_behind_the_backbone_is_noticed(name, share, make, monkeypatch):
    case, features = case_of(name), features_of(name)
    monkeypatch.setattr(Backbone, "forward", lambda *_: features)
    make(monkeypatch, case)
    ours = share_of_other_labels(case)
    assert ours > DIFFERENT_PIXELS
    assert ours == pytest.approx(share, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize(("name", "share", "make"), cases(INPUTS))
def test_a_mistake_before_or_in_the_backbone_is_noticed(name, share, make, monkeypatch):
    case = case_of(name)
    make(monkeypatch, case)
    ours = share_of_other_labels(case)
    assert ours > DIFFERENT_PIXELS
    assert ours == pytest.approx(share, rel=2e-3, abs=2e-4)


def mean_logits(passes: Any, size: tuple[int, int]) -> Tensor:
    return torch.stack([turned(one, size) for one in passes]).sum(0)


def turned(one: Any, size: tuple[int, int]) -> Tensor:
    return labelling.full_logits(one, size)


def largest_probability(passes: Any, size: tuple[int, int]) -> Tensor:
    return torch.stack([turned(one, size).softmax(-1) for one in passes]).amax(0)


def not_turned_back(passes: Any, size: tuple[int, int]) -> Tensor:
    each = [turned(one._replace(mirrored=False), size).softmax(-1) for one in passes]
    return torch.stack(each).sum(0)


def no_mirrored_passes(passes: Any, size: tuple[int, int]) -> Tensor:
    plain = [turned(one, size).softmax(-1) for one in passes if not one.mirrored]
    return torch.stack(plain).sum(0)


@cache
def passes_at_several_scales(name: str) -> Any:
    """What the passes of a case at several scales say, without any mistake."""
    case = case_of(name)
    kept: list[Any] = []

    def keep(given: Any, size: tuple[int, int]) -> Segmentation:
        kept.extend(given)
        return label_pixels(given, size)

    with pytest.MonkeyPatch.context() as patch:
        passes(keep)(patch, case)
        aug = case.meta["aug"]
        segment(case.segmenter, case.pixels, ratios=aug["img_ratios"], mirrored=aug["flip"])
    return kept


@pytest.mark.parametrize(
    ("share", "wrong"),
    [
        pytest.param(0.332273, mean_logits, id="logits averaged"),
        pytest.param(0.438482, not_turned_back, id="not turned back"),
        pytest.param(0.358268, no_mirrored_passes, id="no mirrored passes"),
        pytest.param(0.190098, largest_probability, id="largest probability"),
    ],
)
def test_a_mistake_at_several_scales_is_noticed(share, wrong):
    case = case_of("upn_tiny")
    scores = wrong(passes_at_several_scales("upn_tiny"), case.pixels.shape[:2])
    ours = (scores.argmax(-1).numpy() != case.golden["aug_labels"]).mean()
    assert ours == pytest.approx(share, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("name", ["fpn_tiny", "upn_tiny"])
def test_without_a_mistake_all_labels_are_right(name, monkeypatch):
    case, features = case_of(name), features_of(name)
    monkeypatch.setattr(Backbone, "forward", lambda *_: features)
    assert share_of_other_labels(case) <= DIFFERENT_PIXELS
