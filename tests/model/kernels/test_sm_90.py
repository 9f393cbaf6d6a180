"""The kernels compile for the GPUs they are written for, and fit."""

import json
import os
import subprocess
import sys

import pytest

from tests.server import ROOT


@pytest.mark.slow
def test_every_kernel_fits_in_registers(tmp_path):
    compiled = subprocess.run(
        [sys.executable, "-m", "tests.model.kernels.sm_90"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = json.loads(compiled.stdout)
    assert {kernel["kernel"] for kernel in kernels} == {
        "_add_norm", "_add_one", "_deformable_attention", "_depthwise", "_greedy_search",
        "_linear_gelu", "_local_attention", "_normalise", "_normalise_padded", "_normed_mean",
        "_rank", "_roi_align", "_sample_keys",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        if kernel["kernel"] == "_greedy_search":
            assert kernel["contracted"] == 0, "an IoU at the threshold would round differently"
        # So many warps, in several blocks, at a time: one computes while another one loads.
        few = kernel["dtype"] == "torch.float32" or kernel["kernel"] == "_linear_gelu"
        blocks = -(-(12 if few else 16) // kernel["warps"])
        assert blocks * 32 * kernel["warps"] * kernel["registers"] <= 1 << 16, kernel
        assert blocks * kernel["shared"] <= 227 << 10, kernel
        # Bytes are normalised to the last bit as on the CPU.
        assert kernel["exact"] or not kernel["kernel"].startswith("_normalise"), kernel
