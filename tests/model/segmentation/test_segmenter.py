from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.backbone import SIZES_KEPT
from model.checkpoint import Checkpoint, CheckpointError, read, write
from model.detection.official import is_detector
from model.geometry import MOST_QUERIES
from model.segmentation import (
    SEGMENTERS,
    LoadedSegmenter,
    create_segmenter,
    load_segmenter,
    segment,
)
from model.segmentation.config import RATIOS
from model.segmentation.official import is_segmenter, nearest, official_shapes
from model.segmentation.segmenter import _configure
from model.segmentation.upernet import PyramidPooling
from tests.conftest import GOLDEN, default_dtype
from tests.model.detection import recipe
from tests.model.segmentation.conftest import (
    KINDS,
    auxiliary_state,
    segmenter_state,
    small_config,
    small_segmenter,
)

PUBLISHED = [name for name in SEGMENTERS if "dat_pp" in name]


def test_official_shapes_are_those_of_the_published_segmenters():
    layouts = np.load(GOLDEN / "seg" / "layouts.npz")
    assert set(layouts.files) == set(PUBLISHED)
    for name in layouts.files:
        entries = (line.split(" ") for line in str(layouts[name]).splitlines())
        expected = {
            key: tuple(map(int, shape))
            for key, *shape in entries
            if not key.endswith("num_batches_tracked") and not key.startswith("auxiliary_head.")
        }
        assert official_shapes(SEGMENTERS[name]) == expected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.endswith(("small", "base")) else [])
        for name in PUBLISHED
    ],
)
def test_every_published_segmenter_is_built(name):
    with torch.device("meta"):
        segmenter = create_segmenter(name)
    official = official_shapes(segmenter.config)
    ours = sum(parameter.numel() for parameter in segmenter.parameters())
    assert 0.99 < ours / sum(torch.Size(shape).numel() for shape in official.values()) <= 1
    assert not segmenter.training


def test_an_unknown_segmenter_names_those_there_are():
    with pytest.raises(KeyError, match="semantic_fpn_dat_pp_tiny"):
        create_segmenter("deeplab")


SIZES = [(96, 128), (97, 131), (33, 150), (200, 45)]


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_gives_what_its_images_give_alone(segmenter, size):
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = segmenter.forward_explained(images)
        height, width = (-(-side // 4) for side in size)
        assert together.logits.shape == (3, height, width, 7)
        assert together.logits.std() > 0.5
        for index in range(3):
            alone = segmenter.forward_explained(images[index : index + 1])
            torch.testing.assert_close(
                together.logits[index], alone.logits[0], rtol=1e-3, atol=1e-3
            )
            for ours, theirs in zip(
                together.sampling_locations, alone.sampling_locations, strict=True
            ):
                torch.testing.assert_close(ours[index], theirs[0], rtol=1e-4, atol=1e-4)


def test_no_images_have_no_logits(segmenter):
    cells = torch.zeros(0, 1, 2, dtype=torch.int64)
    seen = segmenter.forward_explained(torch.ones(0, 3, 97, 131), [1], cells)
    assert seen.logits.shape == (0, 25, 33, 7)
    assert len(seen.sampling_locations) == len(segmenter.deformable_layers)
    assert seen.attention[0].weights.shape[:2] == (0, 2)


def test_every_weight_has_a_gradient_in_evaluation_mode_and_takes_effect(segmenter):
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    network = deepcopy(segmenter)
    network(images).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    other = small_segmenter(network.config.kind)
    other.load_state_dict(segmenter_state(network.config, seed=1))
    with torch.inference_mode():
        network(images)
    with torch.no_grad():
        for parameter, new in zip(network.parameters(), other.parameters(), strict=True):
            parameter.copy_(new)
    with torch.inference_mode():
        assert torch.equal(network(images), other(images))


@pytest.mark.parametrize("shape", [(3, 96, 128), (1, 96, 128, 3)])
def test_what_are_no_images_is_refused(segmenter, shape):
    with pytest.raises(ValueError, match=r"reads images \(B, 3, H, W\); got"):
        segmenter(torch.zeros(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_fused_operations_are_the_plain_ones_in_float64(kind):
    images = torch.randn(1, 3, 97, 131, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = small_segmenter(kind)(images)
        with default_dtype(torch.float64):
            expected = small_segmenter(kind).double()(images.double())
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_all_sizes_share_the_parameters_and_few_stay(segmenter):
    views = [segmenter.backbone_for(size) for size in ((64, 97), (97, 64))]
    for parameters in zip(
        segmenter.backbone.parameters(), *(view.parameters() for view in views), strict=True
    ):
        assert all(parameter is parameters[0] for parameter in parameters)
    for width in range(SIZES_KEPT + 2):
        segmenter.backbone_for((64, 100 + width))
    assert len(segmenter._sizes) == SIZES_KEPT


def test_new_weights_reach_all_sizes():
    segmenter = small_segmenter("semantic_fpn")
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        before = segmenter(images)
        segmenter.load_state_dict(segmenter_state(segmenter.config, seed=1))
        assert not torch.allclose(before, segmenter(images))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near(kind):
    images = torch.randn(1, 3, 96, 131, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = small_segmenter(kind)(images)
        ours = small_segmenter(kind).cast(torch.bfloat16)(images.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - expected).std() < 0.2 * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_can_be_captured(kind):
    """It neither reads data nor makes tensors from host values, once it has run.

    On the device without storage, reading a value raises, and so does an operation that mixes
    in a tensor made on the host.
    """
    segmenter = small_segmenter(kind).cast(torch.bfloat16).to("meta")
    images = torch.empty(2, 3, 97, 131, dtype=torch.bfloat16, device="meta")
    cells = torch.empty(2, 2, MOST_QUERIES, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        explained = segmenter.forward_explained(images, (1, 3), cells)
    assert explained.logits.shape == (2, 25, 33, 7)
    assert [len(weights.weights) for weights in explained.attention] == [2, 2]
    assert len(explained.sampling_locations) == len(segmenter.deformable_layers)


def picture(height=90, width=120):
    return recipe.picture(3, height, width)


def test_a_picture_is_seen_plain_and_mirrored_at_every_scale(segmenter, monkeypatch):
    seen = []
    right = type(segmenter).forward
    monkeypatch.setattr(
        type(segmenter), "forward", lambda one, images: seen.append(images) or right(one, images)
    )
    ours = segment(segmenter, picture(), ratios=(0.5, 1.0), mirrored=True)
    assert ours.labels.shape == (90, 120)
    assert [tuple(images.shape[2:]) for images in seen] == [(50, 67)] * 2 + [(100, 133)] * 2
    assert torch.equal(seen[1], seen[0].flip(-1))
    assert torch.equal(seen[3], seen[2].flip(-1))


def test_a_picture_and_its_mirror_image_get_mirrored_labels(segmenter):
    pixels = picture()
    ours, theirs = (
        segment(segmenter, np.ascontiguousarray(image), mirrored=True, confidence=True)
        for image in (pixels, pixels[:, ::-1])
    )
    clear = ours.margins > 1e-2
    assert clear.float().mean() > 0.5
    same = ours.labels == theirs.labels.flip(-1)
    # OpenCV's rounding is not the same from both ends.
    assert same[clear].float().mean() > 0.98


def test_an_elongated_picture_is_refused(segmenter):
    with pytest.raises(ValueError, match="more than 32 pixels a side"):
        segment(segmenter, picture(20, 400))
    with pytest.raises(ValueError, match="more than 32 pixels a side"):
        segment(segmenter, picture(40, 300), ratios=RATIOS)


CLASSES = tuple(f"kind {index}" for index in range(3))
PALETTE = [[10 * index, 0, 255] for index in range(3)]


def official_content(name, *, prefix="", meta=None, **changes):
    """An official file of a published segmenter with all that its training loop stores."""
    config = replace(SEGMENTERS[name], **changes)
    state = segmenter_state(config)
    state |= {key: torch.from_numpy(value) for key, value in auxiliary_state(config).items()}
    counters = {
        f"{key.removesuffix('running_var')}num_batches_tracked": torch.tensor(7)
        for key in state
        if key.endswith("running_var")
    }
    return {
        "meta": {"epoch": 1, "iter": 160000, "config": "…", "hook_msgs": {}, "seed": 0}
        | (meta or {}),
        "state_dict": {f"{prefix}{key}": value for key, value in (state | counters).items()},
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
    }


@pytest.fixture(scope="module")
def official_file(tmp_path_factory):
    """`semantic_fpn_dat_nano` with three classes, as a wrapped model saved it."""
    path = tmp_path_factory.mktemp("segmenter") / "fpn_tiny.pth"
    meta = {"CLASSES": CLASSES, "PALETTE": PALETTE}
    content = official_content("semantic_fpn_dat_nano", prefix="module.", meta=meta, num_classes=3)
    torch.save(content, path)
    return path


def test_an_official_checkpoint_is_recognised_and_read(official_file, tmp_path):
    loaded = load_segmenter(official_file)
    config = loaded.segmenter.config
    assert config == replace(SEGMENTERS["semantic_fpn_dat_nano"], num_classes=3)
    assert loaded.class_names == CLASSES
    assert loaded.palette == ((0, 0, 255), (10, 0, 255), (20, 0, 255))
    assert not loaded.segmenter.training
    own = tmp_path / "own.safetensors"
    write(own, loaded.segmenter.state_dict(), {"variant": config.name})
    again = load_segmenter(own).segmenter
    assert again.config == config
    for one, other in zip(loaded.segmenter.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.endswith(("small", "base")) else [])
        for name in SEGMENTERS
    ],
)
def test_the_state_dict_of_a_segmenter_says_which_it_is(name):
    with torch.device("meta"):
        segmenter = create_segmenter(name, num_classes=3)
    given = Checkpoint(Path("own.pth"), segmenter.state_dict())
    assert _configure(given, None) == segmenter.config


def test_a_state_dict_of_its_own_is_loaded_without_a_name(official_file, tmp_path):
    whole = load_segmenter(official_file).segmenter
    path = tmp_path / "own.pth"
    torch.save(whole.state_dict(), path)
    loaded = load_segmenter(path).segmenter
    assert loaded.config == whole.config
    for name, tensor in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_loaded_segmenter_labels_and_colours_a_picture():
    palette = tuple((10 * index, 0, 255) for index in range(7))
    loaded = LoadedSegmenter(small_segmenter("semantic_fpn"), None, palette)
    pixels = picture(40, 150)
    segmentation = loaded.segment(pixels, confidence=True)
    assert segmentation.labels.shape == (40, 150)
    assert len(segmentation.labels.unique()) > 2
    assert (segmentation.probabilities >= 1 / 7).all()
    assert (segmentation.margins >= 0).all()
    drawn = loaded.overlay(pixels, segmentation, 1)
    assert (drawn == np.array(palette)[segmentation.labels.numpy()]).all()
    assert torch.equal(loaded.segment(pixels).labels, segmentation.labels)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 96), np.uint8),
        np.zeros((64, 96, 4), np.uint8),
        np.zeros((64, 96, 3), np.float32),
        np.zeros((0, 96, 3), np.uint8),
        torch.zeros(64, 96, 3, dtype=torch.uint8),
    ],
    ids=["grey", "transparent", "of floats", "empty", "of torch"],
)
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ValueError, match=r"expected an RGB image \(H, W, 3\), NumPy's uint8"):
        segment(small_segmenter("semantic_fpn"), picture)


def test_several_scales_are_those_of_the_official_tests(monkeypatch):
    loaded = LoadedSegmenter(small_segmenter("semantic_fpn"), None, ())
    seen = []
    right = type(loaded.segmenter).forward
    monkeypatch.setattr(
        type(loaded.segmenter),
        "forward",
        lambda one, images: seen.append(images.shape[2]) or right(one, images),
    )
    loaded.segment(picture(), multi_scale=True)
    assert seen == [50, 50, 75, 75, 100, 100, 125, 125, 150, 150, 175, 175]


def test_the_auxiliary_head_is_accepted_and_left_out():
    """Only a whole one would be computed, and nothing of it is in the network."""
    segmenter = small_segmenter("upernet")
    state = segmenter_state(segmenter.config)
    state["auxiliary_head.conv_seg.weight"] = torch.full((150, 256, 1, 1), torch.nan)
    segmenter.load_state_dict(state)
    expected = small_segmenter("upernet").state_dict()
    assert segmenter.state_dict().keys() == expected.keys()
    assert not any("auxiliary" in name for name in expected)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_an_official_state_dict_says_which_segmenter_it_is_of(name):
    shapes = official_shapes(replace(SEGMENTERS[name], num_classes=5))
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert is_segmenter(state)
    assert nearest(state) == name
    del state["backbone.norms.3.norm.weight"]
    assert nearest(state) is None


def test_names_and_colours_are_those_of_ade20k_where_a_file_has_none():
    config = small_config("upernet")
    state = segmenter_state(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SEGMENTERS, config.name, config)
        loaded = load_segmenter(Checkpoint(GOLDEN / "w.pth", state), config.name)
        assert loaded.class_names is None
        # The rule of Pascal VOC, whose first colours everybody knows.
        assert loaded.palette[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
        assert len(set(loaded.palette)) == 7
        wide = replace(config, num_classes=150)
        given = Checkpoint(GOLDEN / "w.pth", segmenter_state(wide))
        loaded = load_segmenter(given, config.name)
    assert loaded.class_names[0] == "wall"
    assert loaded.class_names[7] == "bed "  # as in every official file
    assert len(loaded.class_names) == len(loaded.palette) == 150
    assert loaded.palette[0] == (120, 120, 120)
    assert loaded.palette[6] == loaded.palette[48] == (140, 140, 140)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"CLASSES": ("one",)}, "meta CLASSES, expected 3 names"),
        ({"CLASSES": (1, 2, 3)}, "meta CLASSES, expected 3 names"),
        ({"PALETTE": PALETTE[:2]}, "palette, expected 3 colours of three numbers from 0 to 255"),
        ({"PALETTE": [[0, 0, 256]] * 3}, "palette, expected 3 colours"),
        ({"PALETTE": [[0, 0]] * 3}, "palette, expected 3 colours"),
        ({"PALETTE": "red"}, "palette, expected 3 colours"),
    ],
)
def test_names_and_colours_that_do_not_fit_are_refused(official_file, meta, message):
    with pytest.raises(CheckpointError, match=rf"fpn_tiny\.pth: {message}"):
        load_segmenter(replace(read(official_file), meta=meta))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"labels": "[1, 2, 3]"}, "labels, expected 3 names"),
        ({"labels": "{}"}, "labels, expected a JSON list"),
        ({"palette": "[[0, 0, 0]"}, "palette, expected a JSON list"),
        ({"palette": "[[0, 0, 0]]"}, "palette, expected 3 colours"),
    ],
)
def test_facts_of_our_own_files_are_checked(official_file, metadata, message):
    with pytest.raises(CheckpointError, match=rf"fpn_tiny\.pth: {message}"):
        load_segmenter(replace(read(official_file), metadata=metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("neck.fpn_convs.0.conv.bias"), "missing neck.fpn_convs.0.conv"),
        (
            lambda state: state.pop("decode_head.scale_heads.2.2.bn.running_var"),
            "missing decode_head.scale_heads.2.2.bn.running_var",
        ),
        (lambda state: state.update(surplus=torch.zeros(1)), "unexpected surplus"),
        (
            lambda state: state.update({"decode_head.conv_seg.bias": torch.zeros(6)}),
            r"decode_head.conv_seg.bias has shape \(6,\), expected \(7,\)",
        ),
        (
            lambda state: state["decode_head.conv_seg.bias"].fill_(torch.nan),
            "decode_head.conv_seg.bias holds values that are not finite",
        ),
    ],
)
def test_a_wrong_state_dict_is_refused_by_name(change, message):
    segmenter = small_segmenter("semantic_fpn")
    state = segmenter_state(segmenter.config)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        segmenter.load_state_dict(state)


def test_faults_of_a_file_name_the_file_and_the_key(official_file, tmp_path):
    content = torch.load(official_file, mmap=True)
    del content["state_dict"]["module.neck.fpn_convs.0.conv.bias"]
    broken = tmp_path / "broken.pth"
    torch.save(content, broken)
    message = r"broken\.pth: not a checkpoint of semantic_fpn_dat_nano: missing neck.fpn_convs.0"
    with pytest.raises(CheckpointError, match=message):
        load_segmenter(broken)
    with pytest.raises(CheckpointError, match=r"fpn_tiny\.pth: not a checkpoint of upernet"):
        load_segmenter(official_file, "upernet_dat_pp_tiny")
    with pytest.raises(CheckpointError, match="no segmenter 'deeplab'"):
        load_segmenter(official_file, "deeplab")


def test_our_own_file_says_what_it_holds(official_file, tmp_path):
    own = tmp_path / "own.safetensors"
    state = load_segmenter(official_file).segmenter.state_dict()
    write(own, state, {"variant": "upernet_dat_pp_tiny"})
    with pytest.raises(CheckpointError, match=r"own\.safetensors: holds a upernet"):
        load_segmenter(own, "semantic_fpn_dat_nano")
    with pytest.raises(CheckpointError, match=r"own\.safetensors: not a checkpoint of upernet"):
        load_segmenter(own)


def test_a_segmenter_inside_of_another_network_loads_its_weights():
    segmenter, again = small_segmenter(KINDS[0]), small_segmenter(KINDS[0])
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    nn.ModuleList([again]).load_state_dict(nn.ModuleList([segmenter]).state_dict())
    for name, tensor in segmenter.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_are_read_as_they_are(kind):
    segmenter, again = small_segmenter(kind), small_segmenter(kind)
    again.load_state_dict(segmenter.state_dict())
    for name, tensor in segmenter.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert is_segmenter(segmenter.state_dict())


def test_a_detector_is_no_segmenter():
    shapes = {"backbone.patch_proj.0.weight": (1,), "roi_head.bbox_head.fc_cls.bias": (81,)}
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    assert is_detector(state)
    assert not is_segmenter(state)
    given = Checkpoint(GOLDEN / "w.pth", state)
    with pytest.raises(CheckpointError, match=r"w\.pth: fits no segmenter; name one of"):
        load_segmenter(given)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_segmenter_is_one_graph(kind):
    segmenter = small_segmenter(kind).cuda()
    images = torch.randn(2, 3, 97, 131, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(side):
            segmenter(images)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            logits = segmenter(images)
        for seed in range(3):
            images.copy_(torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            torch.testing.assert_close(logits, segmenter(images))
    host = small_segmenter(kind)
    with torch.inference_mode():
        torch.testing.assert_close(logits.cpu(), host(images.cpu()), rtol=1e-2, atol=1e-2)


def test_pooling_sees_the_whole_map():
    """A change in one corner reaches the other one, further than any convolution."""
    torch.manual_seed(0)
    pooling = PyramidPooling(4, 32).eval()
    tokens = torch.randn(1, 20, 20, 4)
    changed = tokens.clone()
    changed[0, 0, 0] += 100
    with torch.inference_mode():
        assert not torch.allclose(pooling(tokens)[0, -1, -1], pooling(changed)[0, -1, -1])
