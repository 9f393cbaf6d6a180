"""Plausible mistakes made on purpose: the golden cases have to notice every one.

The table says by how much each mistake moves the logits of the golden case of the tiny variant.
The numbers were measured on another implementation of the official code, which shares nothing
with ours. That ours moves by as much shows that a patch makes the mistake it is named after, and
that the two agree off the beaten path as well.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import DAT, attention, create_model, fused, local_attention
from model.attention import DeformableAttention, DeformableAttentionPP
from model.dat import BlockPP, ConvMlp, ConvNorm
from model.fused import Normed, Stream, convolve
from model.local_attention import WindowAttention, _AxisTiles, _shift_mask, _windows
from tests import recipe
from tests.conftest import GOLDEN, official_state
from tests.model.test_golden import LOGITS

pytestmark = pytest.mark.slow

State = dict[str, Tensor]
# Makes a mistake, in the code or in the official weights before they are loaded.
Make = Callable[[pytest.MonkeyPatch, State], None]


def features(wrong: Callable[[Tensor, int], Tensor]) -> Make:
    """Features are read at `wrong(locations, side of the map)`."""

    def make(patch: pytest.MonkeyPatch, _: State) -> None:
        right = attention.sample_features
        patch.setattr(
            attention,
            "sample_features",
            lambda tokens, at: right(tokens, wrong(at, tokens.shape[1])),
        )

    return make


def bias(wrong: Callable[..., tuple[Tensor, ...]]) -> Make:
    """The bias is read with `wrong(table, query_rows, query_columns, locations)`."""

    def make(patch: pytest.MonkeyPatch, _: State) -> None:
        without_slices(patch)
        right = attention.relative_position_bias
        patch.setattr(attention, "relative_position_bias", lambda *given: right(*wrong(*given)))

    return make


def without_slices(patch: pytest.MonkeyPatch) -> None:
    """DAT++ reads its table the general way, which takes any grid and any point."""
    patch.setattr(DeformableAttentionPP, "bias", DeformableAttention.bias)


def displacement(scale: Callable[[int], float]) -> Make:
    """The displacement of a query from a key is multiplied by `scale(side of the table)`."""

    def wrong(table: Tensor, *positions: Tensor) -> tuple[Tensor, ...]:
        return table, *(position * scale(table.shape[1]) for position in positions)

    return bias(wrong)


def bias_at_reference_points(patch: pytest.MonkeyPatch, _: State) -> None:
    right = DeformableAttention.bias
    for kind in (DeformableAttention, DeformableAttentionPP):
        patch.setattr(
            kind, "bias", lambda layer, at: right(layer, layer.reference_points.expand_as(at))
        )


def axis(kind: type[DeformableAttention], wrong: Callable[[int], Tensor], *names: str) -> Make:
    """The `reference_axis`, the `query_axis` or both of a family are `wrong`."""

    def make(patch: pytest.MonkeyPatch, _: State) -> None:
        without_slices(patch)
        for name in names:
            patch.setattr(kind, name, staticmethod(wrong))

    return make


def points(wrong: Callable[[Tensor, Tensor], Tensor]) -> Make:
    """Sampling locations are `wrong(reference points, raw offsets)`."""

    def make(patch: pytest.MonkeyPatch, _: State) -> None:
        without_slices(patch)
        for kind in (DeformableAttention, DeformableAttentionPP):
            patch.setattr(kind, "move", lambda layer, raw: wrong(layer.reference_points, raw))

    return make


def key_grid(offsets: Tensor) -> Tensor:
    """`(Hk, Wk)` of offsets `(B, G, Hk, Wk, 2)`."""
    return torch.tensor(offsets.shape[2:4])


def offsets_of_tokens(patch: pytest.MonkeyPatch, _: State) -> None:
    project, offsets = DeformableAttention.project, DeformableAttention._offsets

    def wrong(layer: DeformableAttention, tokens: Tensor) -> object:
        # The folded network expects queries that are scaled.
        scaled = tokens * (tokens.shape[-1] / layer.heads) ** -0.5
        patch.setattr(DeformableAttention, "_offsets", lambda *_: offsets(layer, scaled))
        return project(layer, tokens)

    patch.setattr(DeformableAttention, "project", wrong)


def interleaved_groups(patch: pytest.MonkeyPatch, _: State) -> None:
    """Group `g` of `G` has its offsets from channels `g, g + G, g + 2G, ...` of the queries."""
    right = DeformableAttention._offsets
    patch.setattr(
        DeformableAttention,
        "_offsets",
        lambda layer, q: right(layer, q.unflatten(-1, (-1, layer.offset_groups)).mT.flatten(-2)),
    )


def weights(pattern: str, wrong: Callable[[Tensor], Tensor]) -> Make:
    """Official tensors whose names have a pattern at their ends are `wrong`."""

    def make(_: pytest.MonkeyPatch, state: State) -> None:
        named = [key for key in state if re.search(f"{pattern}$", key)]
        assert named
        state.update({key: wrong(state[key]) for key in named})

    return make


def no_residual(kernel: Tensor) -> Tensor:
    """A depthwise 3x3 kernel that takes away what the residual around it adds."""
    changed = kernel.clone()
    changed[:, :, 1, 1] -= 1
    return changed


def built(kind: Any, change: Callable[..., object]) -> Make:
    """Every object of a class is changed as soon as it is made."""

    def make(patch: pytest.MonkeyPatch, _: State) -> None:
        right = kind.__init__

        def init(made: object, *args: object, **kwargs: object) -> None:
            right(made, *args, **kwargs)
            change(made)

        patch.setattr(kind, "__init__", init)

    return make


def rolled(*, by: int, shift: int) -> Make:
    """Shifted windows cut a map rolled by `by`, and have the mask of `shift`."""

    def change(layer: WindowAttention) -> None:
        if not layer.mask.any():
            return
        side = int(len(layer.order) ** 0.5)
        cells = torch.arange(side**2).view(side, side).roll((by, by), (0, 1))
        layer.order = _windows(cells, layer.window).flatten()
        layer.place = layer.order.argsort()
        layer.mask = _shift_mask(side, side, layer.window, shift)

    return built(WindowAttention, change)


def mask(value: float) -> Make:
    """Regions of a shifted window that lie apart get `value` as their bias."""
    return lambda patch, _: patch.setattr(local_attention, "OUTSIDE_WINDOW", value)


def bias_by_place(axis: _AxisTiles) -> None:
    """Each query reads the table as if it were in the middle of its neighbourhood."""
    axis.displacement = (axis.inside.cumsum(-1) + 2).clamp(max=12)


def cut_at_borders(axis: _AxisTiles) -> None:
    """A neighbourhood does not move inwards; what is outside of the map is missing."""
    axis.inside &= (axis.displacement - 6).abs() <= 3


def unit_after_the_norm(patch: pytest.MonkeyPatch, _: State) -> None:
    """The local perception unit adds what it makes of the normed tokens."""

    def enter(block: BlockPP, stream: Stream) -> Normed:
        tokens = stream.sum()
        normed = block.norm1(tokens)
        tokens = tokens + convolve(block.lpu, normed) - normed
        return Normed(tokens, block.norm1(tokens))

    patch.setattr(BlockPP, "enter", enter)


def gelu_before_the_convolution(patch: pytest.MonkeyPatch, _: State) -> None:
    patch.setattr(
        ConvMlp,
        "forward",
        lambda mlp, tokens, residual: Stream(
            residual + mlp.fc2(convolve(mlp.dwconv, F.gelu(mlp.fc1(tokens))))
        ),
    )


def no_gelu_in_the_stem(model: DAT) -> None:
    first, _ = model.stem
    assert isinstance(first, ConvNorm)
    first.activation = "none"


def norm_after_pooling(model: DAT) -> None:
    model.norm.register_forward_pre_hook(lambda _, given: given[0].mean((1, 2), keepdim=True))


def smaller_eps(patch: pytest.MonkeyPatch, _: State) -> None:
    right = F.layer_norm
    patch.setattr(
        F, "layer_norm", lambda x, shape, scale, shift, _: right(x, shape, scale, shift, 1e-6)
    )


def approximate_gelu(patch: pytest.MonkeyPatch, _: State) -> None:
    right = F.gelu
    patch.setattr(fused, "fuses", lambda _: False)
    patch.setattr(F, "gelu", lambda x: right(x, approximate="tanh"))
    patch.setitem(fused._PLAIN, "gelu", F.gelu)

    def exact_in_the_stem(layer: ConvNorm, tokens: Tensor) -> Tensor:
        """Where the change was measured, the stem kept the exact one."""
        normed = layer.norm(convolve(layer.conv, tokens))
        return normed if layer.activation == "none" else right(normed)

    patch.setattr(ConvNorm, "forward", exact_in_the_stem)


V1, PP = DeformableAttention, DeformableAttentionPP
# What is wrong, by how much it moves the logits of DAT and of DAT++ (`None`: it is not a mistake
# there, or nobody measured it), and the patch. All heads of the tiny variants have 32 channels.
MISTAKES: tuple[tuple[str, float | None, float | None, Make], ...] = (
    ("features: align_corners=False", 0.231651, 1.340111,
     features(lambda at, side: ((at + 1) * side - 1) / (side - 1) - 1)),
    ("features: x and y swapped", 0.174813, 1.299861, features(lambda at, _: at.flip(-1))),
    ("features: border padding", 0.025293, None, features(lambda at, _: at.clamp(-1, 1))),
    ("bias: align_corners=False", 0.045876, 0.127737,
     displacement(lambda side: side / (side - 1))),
    ("bias: x and y swapped", 0.152258, 0.114044, bias(lambda table, *at: (table.mT, *at))),
    ("bias: key minus query", 0.161487, 0.142350, displacement(lambda _: -1)),
    ("bias: displacement not halved", 0.108212, None, displacement(lambda _: 2)),
    ("bias: left out", 0.088531, None, bias(lambda table, *at: (table * 0, *at))),
    ("bias: scaled with the scores", 0.068893, None,
     bias(lambda table, *at: (table * 32**-0.5, *at))),
    ("bias: at the reference points", 0.040043, 0.145648, bias_at_reference_points),
    ("bias: queries of DAT++", 0.083487, None, axis(V1, PP.query_axis, "query_axis")),
    ("bias: queries of DAT", None, 0.143474, axis(PP, V1.query_axis, "query_axis")),
    # Queries of DAT are where reference points are, and follow them.
    ("points: reference of DAT++", 0.575640, None,
     axis(V1, PP.reference_axis, "reference_axis", "query_axis")),
    ("points: reference of DAT", None, 0.494797, axis(PP, V1.reference_axis, "reference_axis")),
    ("points: symmetric reference", None, 0.500637, axis(PP, PP.query_axis, "reference_axis")),
    ("points: offsets ignored", 0.140495, 1.007382,
     points(lambda ref, raw: ref.clamp(-1, 1).expand_as(raw))),
    ("points: offsets of x, not of q", 0.156764, None, offsets_of_tokens),
    ("points: groups interleaved", 0.156526, 0.900368, interleaved_groups),
    ("points: reach over Hk - 1", 0.022911, None,
     points(lambda ref, raw: ref + raw.tanh() * 2 / (key_grid(raw) - 1))),
    ("points: reach of 1, not 2", 0.077890, None,
     points(lambda ref, raw: ref + raw.tanh() / key_grid(raw))),
    ("points: no tanh", 0.027510, None, points(lambda ref, raw: ref + raw * 2 / key_grid(raw))),
    ("points: clamped", 0.024955, None,
     points(lambda ref, raw: (ref + raw.tanh() * 2 / key_grid(raw)).clamp(-1, 1))),
    ("points: not clamped", None, 2.007419, points(lambda ref, raw: ref + raw)),
    ("points: tanh around the sum", None, 0.791473, points(lambda ref, raw: (ref + raw).tanh())),
    ("points: reach of 2 over Hk - 1", None, 0.623018,
     points(lambda ref, raw: (ref + raw.tanh() * 2 / (key_grid(raw) - 1)).clamp(-1, 1))),
    ("windows: key minus query", 0.373700, None,
     weights(r"\.relative_position_bias_table", lambda table: table.flip(0))),
    ("windows: shift of floor(7 / 2)", 0.467260, None, rolled(by=-3, shift=3)),
    ("windows: not rolled, but masked", 1.049584, None, rolled(by=0, shift=4)),
    # Nobody else has measured these two.
    ("windows: rolled the other way", 0.963996, None, rolled(by=4, shift=4)),
    ("windows: x and y swapped", 0.446804, None,
     weights(r"\.relative_position_bias_table",
             lambda table: table.view(13, 13, -1).transpose(0, 1).reshape(table.shape))),
    ("windows: no mask", 0.682476, None, mask(0)),
    ("neighbourhoods: query minus key", None, 0.313147,
     weights(r"\.rpb", lambda table: table.flip(1, 2))),
    ("neighbourhoods: x and y swapped", None, 0.217791, weights(r"\.rpb", lambda table: table.mT)),
    ("neighbourhoods: bias not moved at borders", None, 0.145852, built(_AxisTiles, bias_by_place)),
    ("neighbourhoods: cut at borders", None, 0.304343, built(_AxisTiles, cut_at_borders)),
    ("unit: no residual", None, 4.022699, weights(r"perception_units\.\d+\.weight", no_residual)),
    ("unit: after the norm", None, 2.712369, unit_after_the_norm),
    ("MLP: no residual", None, 2.548724, weights(r"\.dwc\.weight", no_residual)),
    ("MLP: GELU before the convolution", None, 0.889126, gelu_before_the_convolution),
    ("stem: no GELU", None, 2.602677, built(DAT, no_gelu_in_the_stem)),
    ("head: norm after pooling", 0.052429, None, built(DAT, norm_after_pooling)),
    ("LayerNorm: eps of 1e-6", 0.001432, 0.004675, smaller_eps),
    ("GELU: tanh approximation", 0.000678, 0.000943, approximate_gelu),
)  # fmt: skip


@cache
def tiny(family: str) -> tuple[State, Tensor, np.ndarray]:
    """Official weights, images and golden logits of the tiny variant."""
    golden = np.load(GOLDEN / f"{family}_tiny_224.npz")
    images = torch.from_numpy(recipe.batch(0, (0, 1), 224, 224))
    return official_state(f"{family}_tiny_224"), images, golden["logits"]


def change_of_logits(family: str, make: Make, patch: pytest.MonkeyPatch) -> float:
    """Largest distance of a logit from the golden one."""
    state, images, logits = tiny(family)
    wrong = dict(state)
    make(patch, wrong)
    model = create_model(f"{family}_tiny_224")
    model.load_state_dict(wrong)
    with torch.inference_mode():
        return float(np.abs(model(images).numpy() - logits).max())


@pytest.mark.parametrize(
    ("family", "change", "make"),
    [
        pytest.param(family, change, make, id=f"{family}-{name}")
        for name, *changes, make in MISTAKES
        for family, change in zip(("dat", "dat_pp"), changes, strict=True)
        if change is not None
    ],
)
def test_a_mistake_is_noticed(family, change, make, monkeypatch):
    ours = change_of_logits(family, make, monkeypatch)
    assert ours > LOGITS
    assert ours == pytest.approx(change, rel=1e-3, abs=1e-5)


def test_a_mask_of_minus_infinity_is_no_mistake(monkeypatch):
    assert change_of_logits("dat", mask(-torch.inf), monkeypatch) < LOGITS
