from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.backbone import SIZES_KEPT
from model.checkpoint import Checkpoint, CheckpointError, read, write
from model.detection import DETECTORS, create_detector, load_detector, rpn
from model.detection.anchors import _sizes
from model.detection.config import MOST_DETECTIONS
from model.detection.detector import _configure
from model.detection.normalise import Normalise
from model.detection.official import official_shapes
from model.geometry import MOST_QUERIES
from tests.conftest import GOLDEN
from tests.fake_cuda import OnDevice, fake_cuda, move
from tests.model.detection.conftest import KINDS, SMALL_BACKBONE, detector_state, small_detector
from tests.server import ROOT


def test_official_shapes_are_those_of_the_published_detectors():
    layouts = np.load(GOLDEN / "det" / "layouts.npz")
    assert len(layouts.files) == 7
    for name in layouts.files:
        entries = (line.split(" ") for line in str(layouts[name]).splitlines())
        expected = {
            key: tuple(map(int, shape))
            for key, *shape in entries
            if not key.endswith("num_batches_tracked")
        }
        assert official_shapes(DETECTORS[name]) == expected


@pytest.fixture(autouse=True)
def few_proposals(monkeypatch):
    """Enough for the small detectors."""
    monkeypatch.setattr(rpn, "MOST_PROPOSALS", 100)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.endswith(("small", "base")) else [])
        for name in DETECTORS
    ],
)
def test_every_published_detector_is_built(name):
    with torch.device("meta"):
        detector = create_detector(name)
    official = official_shapes(detector.config)
    ours = sum(parameter.numel() for parameter in detector.parameters())
    assert 0.99 < ours / sum(torch.Size(shape).numel() for shape in official.values()) <= 1


def test_an_unknown_detector_names_those_there_are():
    with pytest.raises(KeyError, match="retinanet_dat_pp_tiny"):
        create_detector("yolo")


def run(detector, images, resized=None):
    sizes = torch.tensor([resized or images.shape[2:]] * len(images))
    with torch.inference_mode():
        return detector.forward_explained(images, sizes, torch.ones(len(images), 2))


def test_a_batch_gives_what_its_images_give_alone(detector):
    images = torch.randn(3, 3, 96, 128)
    sizes = torch.tensor([[96, 128], [70, 100], [90, 128]])
    scales = torch.tensor([[1.0, 1.0], [1.5, 1.4], [0.5, 0.6]])
    with torch.inference_mode():
        together = detector.forward_explained(images, sizes, scales)
        for index, found in enumerate(together.detections):
            part = slice(index, index + 1)
            alone = detector.forward_explained(images[part], sizes[part], scales[part])
            (expected,) = alone.detections
            assert len(expected.labels) > 3
            torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
            assert torch.equal(found.labels, expected.labels)
            if expected.mask_probabilities is not None:
                torch.testing.assert_close(
                    found.mask_probabilities, expected.mask_probabilities, rtol=1e-2, atol=1e-3
                )
            for ours, theirs in zip(
                together.sampling_locations, alone.sampling_locations, strict=True
            ):
                torch.testing.assert_close(ours[part], theirs, rtol=1e-4, atol=1e-4)


def test_outside_of_inference_mode_it_finds_the_same(detector):
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(9))
    sizes, scales = torch.tensor([[96, 128]]), torch.ones(1, 2)
    (found,) = detector(images, sizes, scales)
    with torch.inference_mode():
        (expected,) = detector(images, sizes, scales)
    assert len(found.scores)
    # With gradients sums are done in another order: pixels differ by their last bits.
    torch.testing.assert_close(found.boxes.detach(), expected.boxes, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.scores.detach(), expected.scores)
    found.scores.sum().backward()
    assert detector.backbone.stem[0].conv.weight.grad.abs().sum() > 0
    detector.zero_grad()


def test_in_no_images_nothing_is_found(detector):
    images, sizes = torch.ones(0, 3, 96, 128), torch.ones(0, 2, dtype=torch.int64)
    assert detector(images, sizes, torch.ones(0, 2)) == []
    cells = torch.zeros(0, 1, 2, dtype=torch.int64)
    found, locations, attention = detector.find(images, sizes, torch.ones(0, 2), [1], cells)
    assert (found.boxes.shape[0], found.boxes.shape[2], found.counts.shape) == (0, 4, (0,))
    assert len(locations) == len(detector.deformable_layers)
    assert (len(attention), attention[0].weights.shape[:2]) == (1, (0, 2))


@pytest.mark.parametrize(
    ("images", "sizes", "message"),
    [
        (torch.zeros(3, 96, 128), torch.ones(3, 2), r"reads images \(B, 3, H, W\)"),
        (torch.zeros(1, 96, 128, 3), torch.ones(1, 2), r"reads images \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 96, 128), torch.ones(1, 2), r"2 images have .*got \(1, 2\) and"),
        (torch.zeros(1, 3, 96, 128), torch.ones(2), r"1 images have .*got \(2,\) and"),
        (torch.zeros(1, 3, 96, 128).double(), torch.ones(1, 2), "got images in .*float64"),
    ],
    ids=["no batch", "channels last", "too few sizes", "no batch of sizes", "doubles"],
)
def test_images_and_sizes_that_do_not_fit_are_refused(detector, images, sizes, message):
    with pytest.raises(ValueError, match=message):
        detector(images, sizes, sizes)


def test_boxes_lie_inside_the_image_and_are_best_first(detector):
    (found,) = run(detector, torch.randn(1, 3, 96, 128), (70, 100)).detections
    assert len(found.labels) > 3
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([100, 70, 100, 70])).all()
    assert (found.scores.diff() <= 0).all()
    assert (found.scores > 0.05).all()
    assert found.labels.max() < detector.config.num_classes
    if detector.config.kind != "retinanet":
        assert found.mask_probabilities.shape == (len(found.labels), 28, 28)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_anything(kind):
    detector = small_detector(kind)
    heads = [detector.head] if kind == "retinanet" else detector.head.box_heads
    for head in heads:
        background = slice(None if kind == "retinanet" else -1)
        head.classes.bias.data[background] -= 100
    (found,) = run(detector, torch.randn(1, 3, 96, 128)).detections
    assert found.boxes.shape == (0, 4)
    assert len(found.scores) == len(found.labels) == 0
    if kind != "retinanet":
        assert found.mask_probabilities.shape == (0, 28, 28)


def test_a_side_of_32_pixels_is_refused(detector):
    """One cell on the last map leaves the positions of the queries undefined."""
    with pytest.raises(ValueError, match="at least 33 pixels"):
        run(detector, torch.zeros(1, 3, 32, 1344))


def test_all_sizes_share_the_parameters(detector):
    views = [detector.backbone_for(size) for size in ((64, 96), (96, 64))]
    for parameters in zip(
        detector.backbone.parameters(), *(view.parameters() for view in views), strict=True
    ):
        assert all(parameter is parameters[0] for parameter in parameters)
    assert detector.backbone_for((64, 96)) is views[0]


def test_sizes_in_memory_are_bounded():
    detector = small_detector("retinanet")
    first = detector.backbone_for((64, 64))
    for index in range(SIZES_KEPT - 1):
        detector.backbone_for((64, 96 + 32 * index))
    assert detector.backbone_for((64, 64)) is first
    detector.backbone_for((96, 96))
    assert detector.backbone_for((64, 64)) is first
    for index in range(SIZES_KEPT):
        detector.backbone_for((128, 96 + 32 * index))
    assert detector.backbone_for((64, 64)) is not first


def test_new_weights_reach_all_sizes():
    detector = small_detector("retinanet")
    images = torch.randn(1, 3, 64, 96)
    before = run(detector, images).detections[0]
    other = detector_state(detector.config, seed=1)
    detector.load_state_dict(other)
    after = run(detector, images).detections[0]
    assert not torch.equal(before.scores, after.scores)
    fresh = small_detector("retinanet")
    fresh.load_state_dict(other)
    torch.testing.assert_close(run(fresh, images).detections[0].scores, after.scores)


@pytest.fixture(scope="module")
def official_file(tmp_path_factory):
    """`retinanet_dat_pp_tiny` in the form of the official checkpoints, with three classes."""
    detector = create_detector("retinanet_dat_pp_tiny", num_classes=3)
    state = {f"module.{key}": tensor for key, tensor in detector_state(detector.config).items()}
    state["module.bbox_head.bn.num_batches_tracked"] = torch.tensor(7)
    path = tmp_path_factory.mktemp("detector") / "rtn_tiny.pth"
    meta = {"CLASSES": ("cat", "dog", "owl"), "epoch": 36, "config": "model = dict()"}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


def test_an_official_checkpoint_is_recognised_and_read(official_file, tmp_path):
    loaded = load_detector(official_file)
    assert loaded.detector.config.name == "retinanet_dat_pp_tiny"
    assert loaded.detector.config.num_classes == 3
    assert loaded.labels == ("cat", "dog", "owl")
    assert not loaded.detector.training
    own = tmp_path / "own.safetensors"
    write(own, loaded.detector.state_dict(), {"variant": "retinanet_dat_pp_tiny"})
    again = load_detector(own).detector
    assert again.config == loaded.detector.config
    for one, other in zip(loaded.detector.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.endswith(("small", "base")) else [])
        for name in DETECTORS
    ],
)
def test_the_state_dict_of_a_detector_says_which_it_is(name):
    with torch.device("meta"):
        detector = create_detector(name, num_classes=3)
    given = Checkpoint(Path("own.pth"), detector.state_dict())
    assert _configure(given, None) == detector.config


def test_a_state_dict_of_its_own_is_loaded_without_a_name(tmp_path):
    whole = load_detector(ROOT / "demo/detection/mask_rcnn_dat_nano.safetensors").detector
    path = tmp_path / "own.pth"
    torch.save(whole.state_dict(), path)
    loaded = load_detector(path)
    assert loaded.detector.config == whole.config
    for name, tensor in whole.state_dict().items():
        assert torch.equal(loaded.detector.state_dict()[name], tensor)
    state = whole.state_dict()
    del state["fpn.laterals.0.bias"]
    torch.save(state, path)
    message = r"own\.pth: fits no detector; name one of retinanet_dat_pp_tiny, .* what differs"
    with pytest.raises(CheckpointError, match=message):
        load_detector(path)


def test_our_own_file_says_what_it_holds(tmp_path):
    detector = create_detector("mask_rcnn_dat_pp_tiny", num_classes=3, backbone=SMALL_BACKBONE)
    path = tmp_path / "own.safetensors"
    write(path, detector.state_dict(), {"variant": "retinanet_dat_pp_tiny"})
    with pytest.raises(CheckpointError, match=r"own\.safetensors: holds a retinanet"):
        load_detector(path, "mask_rcnn_dat_pp_tiny")
    with pytest.raises(CheckpointError, match=r"own\.safetensors: not a checkpoint of retinanet"):
        load_detector(path)


def test_a_converted_detector_has_its_labels():
    loaded = load_detector(ROOT / "demo/detection/mask_rcnn_dat_nano.safetensors")
    assert loaded.labels is not None
    assert (len(loaded.labels), loaded.labels[0]) == (loaded.detector.config.num_classes, "arrow")


def test_a_detector_inside_of_another_network_loads_its_weights():
    detector, again = small_detector(KINDS[0]), small_detector(KINDS[0])
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    nn.ModuleList([again]).load_state_dict(nn.ModuleList([detector]).state_dict())
    for name, tensor in detector.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_are_read_as_they_are(kind):
    detector = small_detector(kind)
    again = small_detector(kind)
    again.load_state_dict(detector.state_dict())
    for name, tensor in detector.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("neck.fpn_convs.0.conv.bias"), "missing neck.fpn_convs.0.conv"),
        (lambda state: state.update(surplus=torch.zeros(1)), "unexpected surplus"),
        (
            lambda state: state.update({"bbox_head.retina_reg.bias": torch.zeros(35)}),
            r"bbox_head.retina_reg.bias has shape \(35,\), expected \(36,\)",
        ),
        (
            lambda state: state["bbox_head.retina_reg.bias"].fill_(torch.nan),
            "bbox_head.retina_reg.bias holds values that are not finite",
        ),
    ],
)
def test_a_wrong_state_dict_is_refused_by_name(change, message):
    detector = small_detector("retinanet")
    state = detector_state(detector.config)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        detector.load_state_dict(state)


def test_faults_of_a_file_name_the_file(official_file, tmp_path):
    content = torch.load(official_file, mmap=True)
    del content["state_dict"]["module.neck.fpn_convs.0.conv.bias"]
    broken = tmp_path / "broken.pth"
    torch.save(content, broken)
    with pytest.raises(CheckpointError, match=r"broken\.pth: fits no detector"):
        load_detector(broken)
    with pytest.raises(CheckpointError, match=r"broken\.pth: .*missing neck.fpn_convs.0.conv.bias"):
        load_detector(broken, "retinanet_dat_pp_tiny")
    with pytest.raises(CheckpointError, match=r"rtn_tiny\.pth: not a checkpoint of mask_rcnn"):
        load_detector(official_file, "mask_rcnn_dat_pp_tiny")
    with pytest.raises(CheckpointError, match="no detector 'yolo'"):
        load_detector(official_file, "yolo")


@pytest.mark.parametrize("names", [("cat",), "cat", (1, 2, 3)])
def test_names_that_do_not_fit_the_classes_are_refused(official_file, names):
    given = replace(read(official_file), meta={"CLASSES": names})
    with pytest.raises(CheckpointError, match=r"rtn_tiny\.pth: meta CLASSES, expected 3 names"):
        load_detector(given)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_part_can_be_captured(kind):
    """It neither reads data nor makes tensors from host values, once it has run.

    On the device without storage, reading a value raises, and so does an operation that mixes
    in a tensor made on the host.
    """
    detector = small_detector(kind).cast(torch.bfloat16).to("meta")
    normalise = Normalise(torch.bfloat16).to("meta")
    pixels = torch.empty(2, 96, 128, 3, dtype=torch.uint8, device="meta")
    resized = torch.empty(2, 2, dtype=torch.int64, device="meta")
    cells = torch.empty(2, 2, MOST_QUERIES, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        dense = detector.dense(normalise(pixels, resized), resized, (1, 3), cells)
    assert [len(weights.weights) for weights in dense.attention] == [2, 2]
    assert dense.candidates.boxes.dtype == torch.float32
    assert dense.levels[0].dtype == torch.bfloat16
    assert len(dense.sampling_locations) == len(detector.deformable_layers)


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_pyramid_to_what_was_found_nothing_waits_for_the_device(kind):
    head = small_detector(kind).cast(torch.bfloat16).head
    finest = 8 if kind == "retinanet" else 4
    sizes = [(-(-96 // stride), 128 // stride) for stride in (finest << i for i in range(5))]
    _sizes.cache_clear()
    with fake_cuda() as launched:
        move(head)
        levels = [torch.empty(2, *size, 16, dtype=torch.bfloat16, device="cuda") for size in sizes]
        limits, scales = torch.empty(2, 2, 2, device="cuda")
        head(levels, limits)  # the anchors are on the device from here on
        with OnDevice():
            found = head.find(levels, head(levels, limits), limits, scales)
    _sizes.cache_clear()
    assert launched.count("_greedy_search") == (1 if kind == "retinanet" else 2)
    assert found.boxes.shape == (2, MOST_DETECTIONS, 4)
    assert found.scores.shape == found.labels.shape == (2, MOST_DETECTIONS)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.counts.shape == (2,)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_detector_is_one_graph(kind):
    detector = small_detector(kind).cuda()
    sizes = torch.tensor([[96, 128], [70, 100]], device="cuda")
    scales = torch.tensor([[1.0, 1.0], [1.5, 1.4]], device="cuda")
    images = torch.randn(2, 3, 96, 128, device="cuda")
    asked = (1, 3), torch.tensor([[[3] * (MOST_QUERIES - 1) + [-1]] * 2] * 2, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(side):
            detector.find(images, sizes, scales, *asked)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            found, _, attention = detector.find(images, sizes, scales, *asked)
        for seed in range(3):
            images.copy_(torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            eager, _, expected = detector.find(images, sizes, scales, *asked)
            torch.testing.assert_close(attention, expected)
            assert min(found.counts) > 3
            assert found.counts.tolist() == eager.counts.tolist()
            torch.testing.assert_close(found.boxes, eager.boxes)
            torch.testing.assert_close(found.scores, eager.scores)


def test_found_is_what_the_detections_are_cut_from(detector):
    images, sizes = torch.randn(2, 3, 96, 128), torch.tensor([[96, 128], [40, 50]])
    with torch.inference_mode():
        found, locations, _ = detector.find(images, sizes, torch.ones(2, 2))
        explained = detector.forward_explained(images, sizes, torch.ones(2, 2))
    assert [len(one.labels) for one in explained.detections] == found.counts.tolist()
    assert min(found.counts) > 3
    for image, one in enumerate(explained.detections):
        for name in ("boxes", "scores", "labels", "mask_probabilities"):
            whole, cut = getattr(found, name), getattr(one, name)
            assert cut is whole is None or torch.equal(cut, whole[image, : len(one.labels)])
    assert all(map(torch.equal, locations, explained.sampling_locations))


def test_half_precision_leaves_position_tables_alone_in_float32():
    """A norm on CUDA refuses maps of another type than its own."""
    detector = small_detector("retinanet").cast(torch.bfloat16)
    kept = {name for name, value in detector.named_parameters() if value.dtype == torch.float32}
    assert kept
    assert all(name.endswith("relative_position_bias_table") for name in kept)
