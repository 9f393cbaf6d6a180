"""What is switched for the whole process, each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.server import ROOT
from tests.service.commands import command

SWITCHED = """
import json, os, sys
from pathlib import Path
from service import process
process.begin()
{calls}
import cv2, torch
from PIL import Image
from model import kernels
print(json.dumps([
    os.environ["GOMP_SPINCOUNT"], sys.getswitchinterval(), torch.get_num_threads(),
    cv2.getNumThreads(), Image.MAX_IMAGE_PIXELS, kernels.enabled,
    os.environ.get("TRITON_CACHE_DIR"), os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
    os.environ.get("GRPC_VERBOSITY"),
    torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32,
]))
"""

TF32_AFTER = """
import json, sys
import torch
from service import cli
backends = torch.backends.cudnn, torch.backends.cuda.matmul
for arguments in (["serve"], ["evaluate", "--data", "tests"]):
    for backend in backends:
        backend.allow_tf32 = True
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit:
        print(json.dumps([backend.allow_tf32 for backend in backends]))
"""


def switched(*calls: str):
    ended = subprocess.run(
        [sys.executable, "-c", SWITCHED.format(calls="\n".join(calls))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ended.stdout)


@pytest.mark.slow
def test_every_switch_is_set_by_its_call_alone(tmp_path):
    before = switched()
    after = switched(
        "import torch",  # where it is loaded; a front end does without
        "process.compute_alone()",
        "process.leave_limits_to_us()",
        f"process.choose_kernels(False, Path({str(tmp_path)!r}))",
        "process.silence_grpc()",
        "process.compute_float32_in_full()",
    )
    assert before[:2] == after[:2] == ["2000", pytest.approx(0.0001)]
    assert before[4] is not None
    assert before[5] is before[-1] is True
    caches = [str(tmp_path / "triton"), str(tmp_path / "inductor")]
    assert after[2:] == [1, 1, None, False, *caches, "NONE", False]


@pytest.mark.slow
def test_float32_is_not_tf32_when_a_gpu_is_opened():
    """Seen where a command has ended, because there is no such GPU."""
    free_ports = {f"DAT_SERVER__{name}_PORT": "0" for name in ("HTTP", "GRPC", "METRICS")}
    ended = subprocess.run(
        [sys.executable, "-c", TF32_AFTER],
        cwd=ROOT,
        env=os.environ | free_ports | {"DAT_ENGINE__DEVICE": "cuda:99"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr.count("cuda:99") == 2
    assert ended.stdout.splitlines() == ["[false, false]"] * 2


def line_of_start(event, **settings):
    """A line of the log from before the server is ready."""
    starting = command(DAT_LOG__FORMAT="json", DAT_MODEL__NAME="dat_nano", **settings)
    try:
        return next(line for line in map(json.loads, starting.stdout) if line["event"] == event)
    finally:
        starting.kill()
        starting.communicate()


def test_the_setting_of_the_kernels_reaches_the_server(server):
    switched_off = line_of_start("computes", DAT_ENGINE__KERNELS="false", DAT_BATCHING__MAX_BATCH=1)
    assert switched_off["kernels"] == "off: switched off"
    (default,) = (
        name
        for name in server.metrics()
        if name.startswith("dat_model_engine_info") and "model=dat_nano" in name
    )
    assert ",kernels=on," in default or ",kernels=off: cpu," in default
