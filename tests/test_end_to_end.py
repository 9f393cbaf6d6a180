"""Pictures that nobody trained on, through the running server, against the truth."""

import asyncio

import numpy as np
import pytest
from pycocotools import mask as coco

from demo.detection.scenes import CLASSES
from demo.detection.scenes import upload as upload_of_several
from demo.segmentation.maps import NAMES, labels
from demo.segmentation.maps import upload as upload_of_large_ones
from demo.views import upload
from tests import detection_clients, segmentation_clients
from tests.clients import over_grpc, over_http, over_json, over_stream

SERIES = 1_000_003  # of no other use in this repository
LARGEST_SIDE = 640


@pytest.fixture(scope="module")
def pictures_of_one():
    return [upload(SERIES, index, LARGEST_SIDE) for index in range(30)]


@pytest.fixture(scope="module")
def pictures_of_several():
    return [upload_of_several(SERIES, index) for index in range(12)]


@pytest.mark.parametrize("classify", [over_http, over_json, over_grpc, over_stream])
async def test_the_demo_model_names_the_object_and_looks_at_it(server, classify, pictures_of_one):
    answers = await asyncio.gather(
        *(classify(server, [file], explain="points", top_k=1) for _, file in pictures_of_one)
    )
    right, looked = [], []
    for (scene, _), answer in zip(pictures_of_one, answers, strict=True):
        (result,) = answer.results
        height, width = scene.pixels.shape[:2]
        assert result.size == (width, height)
        ((_, index, _),) = result.predictions
        right.append(index == scene.label)
        last = result.layers[-1]
        centre = np.array(scene.centre_xy)
        moved = np.linalg.norm(last.sampling_locations - centre, axis=-1)
        reference = np.linalg.norm(last.reference_points - centre, axis=-1)
        looked.append((moved < reference).mean() > 0.5)
    assert np.mean(right) >= 0.95
    assert np.mean(looked) >= 0.95


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools under NumPy 2
@pytest.mark.parametrize("detect", detection_clients.CLIENTS)
async def test_the_demo_detector_finds_the_objects_and_their_pixels(
    server, detect, pictures_of_several
):
    answers = await asyncio.gather(
        *(detect(server, [file], score_threshold=0.6) for _, file in pictures_of_several)
    )
    hits, objects, detections, overlaps = 0, 0, 0, []
    for (scene, _), answer in zip(pictures_of_several, answers, strict=True):
        (image,) = answer.images
        objects += len(scene.labels)
        detections += len(image.found)
        for label, box, mask in zip(scene.labels, scene.boxes, scene.masks, strict=True):
            matching = [
                found
                for found in image.found
                if found.label == CLASSES[label] and intersection_over_union(found.box, box) > 0.5
            ]
            hits += bool(matching)
            if matching:
                pixels = coco.decode(matching[0].mask["rle"]).astype(bool)
                overlaps.append((pixels & mask).sum() / (pixels | mask).sum())
    assert hits / objects > 0.6
    assert hits / detections > 0.6
    assert np.mean(overlaps) > 0.7


@pytest.mark.parametrize("segment", segmentation_clients.CLIENTS)
async def test_the_demo_segmenter_labels_the_pixels(server, segment):
    scenes = [upload_of_large_ones(SERIES, index) for index in range(8)]
    answers = await asyncio.gather(*(segment(server, [file]) for _, file in scenes))
    right, united = np.zeros(len(NAMES)), np.zeros(len(NAMES))
    for (scene, _), answer in zip(scenes, answers, strict=True):
        (image,) = answer.images
        truth, found = labels(scene), image.labels
        assert {segment.label for segment in image.segments} == {NAMES[i] for i in np.unique(found)}
        for index in range(len(NAMES)):
            right[index] += ((truth == index) & (found == index)).sum()
            united[index] += ((truth == index) | (found == index)).sum()
    assert (right.sum() / united.sum()) > 0.8
    assert (right[1:].sum() / united[1:].sum()) > 0.65


def intersection_over_union(a, b):
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    shared = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    return shared / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared)
