"""The written truth, as pycocotools reads it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from demo.detection.coco import SEED, dataset, run_lengths, write
from demo.detection.scenes import CLASSES, scene, upload

# Its extension module still speaks to numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@settings(deadline=None)
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=7)))
def test_run_lengths_hold_the_mask(mask):
    counts = run_lengths(mask)
    assert sum(counts) == mask.size
    encoded = coco_mask.frPyObjects({"size": list(mask.shape), "counts": counts}, *mask.shape)
    np.testing.assert_array_equal(coco_mask.decode(encoded), mask)


@pytest.mark.parametrize("value", [True, False])
def test_run_lengths_of_an_even_mask(value):
    assert run_lengths(np.full((2, 3), value)) == ([0, 6] if value else [6])


def test_a_written_folder_loads(tmp_path, capsys):
    write(tmp_path, 5, SEED)
    known = COCO(tmp_path / "instances.json")
    assert capsys.readouterr()
    assert [known.cats[index + 1]["name"] for index in range(len(CLASSES))] == list(CLASSES)
    assert len(known.imgs) == 5
    for index, image in known.imgs.items():
        rendered, _ = upload(SEED, index)
        with Image.open(tmp_path / "images" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])
            pixels = np.asarray(file, np.int16)
        assert np.abs(pixels - rendered.pixels).mean() < 8
        found = known.loadAnns(known.getAnnIds(index))
        assert [entry["category_id"] - 1 for entry in found] == rendered.labels.tolist()
        for entry, mask, box in zip(found, rendered.masks, rendered.boxes, strict=True):
            np.testing.assert_array_equal(known.annToMask(entry), mask)
            assert entry["area"] == mask.sum()
            assert entry["bbox"] == pytest.approx([*box[:2], *(box[2:] - box[:2])])


def test_the_truth_is_plain_json():
    truth = dataset([scene(SEED, 0, 40, 60)])
    assert json.loads(json.dumps(truth)) == truth
