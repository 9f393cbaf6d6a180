"""bfloat16 on a CPU: computed right whatever its instructions, and told at the start."""

import json
import os
import subprocess
import sys

import pytest
import torch
from structlog.testing import capture_logs

from model.fused import has_bfloat16
from service.engine import bfloat16
from tests.server import ROOT

# oneDNN reads the variable once, so it is another process that has a lesser CPU.
ON_A_LESSER_CPU = """
import json, sys, torch
from structlog.testing import capture_logs
from demo.evaluate import bundled_model
from model.fused import has_bfloat16
from service.engine import bfloat16
from service.engine.classification import ClassificationEngine
from bench.open_engine import OpenEngine
from service.engine.device import Device
from service.engine.items import ClassificationInput

torch.set_num_threads(1)
pixels = torch.randint(256, (4, 128, 128, 3), dtype=torch.uint8).numpy()
scores = {}
for dtype in ("float32", "bfloat16"):
    engine = OpenEngine(bundled_model(), Device("cpu", 1), dtype, max_batch=4)
    outputs = engine.run([ClassificationInput(image) for image in pixels])
    scores[dtype] = torch.stack([torch.from_numpy(o.scores[o.classes.argsort()]) for o in outputs])
with capture_logs() as lines:
    bfloat16.advise(torch.float32, 10**9)
    bfloat16.advise(torch.bfloat16, 10**9)
print(json.dumps({
    "has": has_bfloat16(),
    "difference": (scores["float32"] - scores["bfloat16"]).abs().max().item(),
    "lines": [(line["log_level"], line["event"]) for line in lines],
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("most", ["AVX2", "AVX512_CORE"])
def test_a_cpu_without_instructions_for_it_computes_it_and_is_told_so(most):
    ended = subprocess.run(
        [sys.executable, "-c", ON_A_LESSER_CPU],
        cwd=ROOT,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": most},
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said["difference"] < 0.05
    assert said["lines"] == [["warning", "bfloat16 is slow"]]
    if most == "AVX2":
        assert not said["has"]


def test_what_is_faster_is_told_once_with_how_to_switch_it_on():
    times = bfloat16.speedup()  # is kept, so the lines are about this one
    bfloat16._advise_once.cache_clear()
    with capture_logs() as lines:
        for dtype in (torch.float32, torch.bfloat16):
            bfloat16.advise(dtype, 100)  # too small to gain anything
    assert not lines
    with capture_logs() as lines:
        for dtype in 2 * (torch.float32, torch.bfloat16):
            bfloat16.advise(dtype, 10**9)
    said = [(line["log_level"], line["event"], line["times"]) for line in lines]
    if times >= 1.15:
        assert said == [("info", "bfloat16 is faster", round(times, 1))]
        assert "DAT_ENGINE__DTYPE=bfloat16" in lines[0]["how"]
    elif times < 1:
        assert said == [("warning", "bfloat16 is slow", round(times, 1))]
    else:
        assert not said


def test_the_trial_changes_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    bfloat16.speedup.cache_clear()
    assert bfloat16.speedup() > 0 or not has_bfloat16()
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)
