import re
import shlex
from itertools import pairwise

import pytest

from tests.deploy.mounts import runs_code, tmpfs, volume


def run_lines(path):
    """The arguments of each `docker run` that a page shows."""
    return [
        shlex.split(line)[2:]
        for line in re.findall(r"^(?:    |\$ )(docker run .*)", path.read_text(), re.MULTILINE)
    ]


def values(line, option):
    return [value for name, value in pairwise(line) if name == option]


@pytest.fixture(scope="module", params=["README.md", "deploy/README.md"])
def lines(request, root):
    return run_lines(root / request.param)


def test_a_gpu_is_given_to_the_image_for_cuda_whose_server_must_use_it(lines, settings_of):
    assert any("--gpus" in line for line in lines)
    for line in lines:
        assert ("--gpus" in line) == line[-1].endswith("-cuda")
        variables = dict(text.split("=", 1) for text in values(line, "--env"))
        assert settings_of(variables).engine.device == ("cuda" if "--gpus" in line else "auto")


def test_the_root_is_read_only_and_compiled_kernels_can_be_executed(lines, code_folders):
    for line in lines:
        assert "--read-only" in line
        mounts = dict(map(tmpfs, values(line, "--tmpfs"))) | dict(
            map(volume, values(line, "--volume"))
        )
        for folder in code_folders:
            assert runs_code(folder, mounts) == ("--gpus" in line), folder
