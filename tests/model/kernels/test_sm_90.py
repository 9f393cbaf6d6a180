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
        "_packed_attention", "_rank", "_roi_align", "_sample_keys",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        # So many warps, in several blocks, at a time: one computes while another one loads. Float32
        # is not what the kernels are for.
        warps = 8 if kernel["dtype"] == "torch.float32" else 16
        if kernel["kernel"] == "_linear_gelu":
            warps = 12
        blocks = -(-warps // kernel["warps"])
        assert blocks * 32 * kernel["warps"] * kernel["registers"] <= 1 << 16, kernel
        assert blocks * kernel["shared"] <= 227 << 10, kernel
        # Pixels are normalised to the last bit as on the CPU. A product and a sum are one operation
        # only in the divisions: two each, for 16 bytes of a thread. An IoU at the threshold has to
        # be rounded as there, too.
        contracted = {"_normalise": 2 * 2 * 16, "_normalise_padded": 0, "_greedy_search": 0}
        if kernel["kernel"] in contracted:
            assert kernel["contracted"] == contracted[kernel["kernel"]], kernel
            assert not kernel["approximate"], kernel
