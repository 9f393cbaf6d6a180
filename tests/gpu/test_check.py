"""A wrong answer of a GPU is seen."""

import json
from dataclasses import replace

import numpy as np
import pytest

from service.engine.device import Device
from service.engine.items import ClassificationOutput, DetectionOutput
from tests.gpu.check import compare, in_flight, share_found


def output(*scores: float) -> ClassificationOutput:
    order = np.argsort(scores)[::-1]
    points = (np.full((1, 2, 2, 2), 0.5, np.float32),)
    return ClassificationOutput(np.array(scores, np.float32)[order], order.astype(np.int32), points)


@pytest.mark.parametrize(
    ("ours", "error"), [((0.5, 0.3, 0.2), 0), ((0.3, 0.5, 0.2), 0.2), ((0.5, 0.29, 0.21), 0.01)]
)
def test_probabilities_are_compared_class_by_class(ours, error, capsys):
    expected = [output(0.1, 0.8, 0.1), output(0.5, 0.3, 0.2)]
    moved = replace(output(*ours), sampling_locations=(np.zeros((1, 2, 2, 2), np.float32),))
    compare("m", "title", [expected[0], moved], expected)
    scores, points = (json.loads(line)["figure"] for line in capsys.readouterr().out.splitlines())
    assert scores == pytest.approx(error, abs=1e-6)
    assert points == 0.5


def test_an_object_is_found_at_its_place_with_its_class():
    boxes = np.float32([[0, 0, 20, 20], [30, 0, 50, 20], [0, 40, 20, 60], [60, 60, 80, 80]])
    exact = DetectionOutput(boxes, np.float32([0.9, 0.8, 0.7, 0.3]), np.array([1, 2, 3, 4]), None)
    shift = np.float32([[3, -3, 3, 3], [5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    ours = replace(exact, boxes=boxes + shift, classes=np.array([1, 2, 2, 4]))
    assert share_found([exact], [exact]) == 1
    assert share_found([ours], [exact]) == pytest.approx(1 / 3)
    with pytest.raises(AssertionError, match="sure of no object"):
        share_found([ours], [replace(exact, scores=exact.scores / 2)])


@pytest.mark.parametrize("turn", [0, 1])
async def test_batches_are_all_begun_before_one_is_read(turn):
    done = []

    def launch(batch):
        done.append(f"begin {batch}")

        def results():
            done.append(f"read {batch}")
            return [batch]

        return results

    device = Device("cpu", 1)
    assert await in_flight(device, launch, ["a", "b"], turn) == [["a"], ["b"]]
    device.close()
    first, second = ("a", "b") if turn else ("b", "a")
    assert done == ["begin a", "begin b", f"read {first}", f"read {second}"]
