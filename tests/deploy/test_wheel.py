"""The wheel works outside of the checkout: class names, demo weights and stubs are inside."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import httpx
import pytest

from demo import samples
from demo.detection import samples as scenes
from tests.server import ROOT, running

# It builds and installs for a minute, and breaks where packages or their data move.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from what git knows, as a release is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(
        ["git", "clone", "--quiet", "--no-hardlinks", ROOT, source], check=True, timeout=60
    )
    changed = subprocess.run(
        ["git", "diff", "HEAD"], cwd=ROOT, check=True, capture_output=True, timeout=60
    ).stdout
    if changed:
        subprocess.run(["git", "apply"], cwd=source, input=changed, check=True, timeout=60)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        check=True,
        timeout=100,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment of its own, whose dependencies are borrowed from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install",
         "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
        timeout=100,
    )  # fmt: skip
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_holds_the_packages_and_their_data_alone(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "model", "service", "demo", next(n for n in names if "dist-info" in n).split("/")[0],
    }  # fmt: skip
    for needed in (
        "demo/dat_nano.safetensors",
        "demo/swin_nano.safetensors",
        "demo/detection/mask_rcnn_dat_nano.safetensors",
        "demo/segmentation/semantic_fpn_dat_nano.safetensors",
        "model/segmentation/ade20k.json",
        "service/models/labels/imagenet1k.json",
        "service/models/labels/coco.json",
        "service/pb/dat_pb2.py",
        "service/playground/page/index.html",
        "service/playground/page/docs/docs.js",
        "service/playground/page/docs/attention.html",
        "service/playground/page/docs/pictures/swin.png",
        "demo/samples/star.jpg",
        "demo/detection/samples/many.jpg",
    ):
        assert needed in names


def test_what_was_installed_serves_outside_of_the_checkout(installed: Path, tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DAT_", "PYTHONPATH"))}
    with running([installed / "bin" / "dat-serve"], environment, tmp_path) as server:
        place = subprocess.run(
            [installed / "bin" / "python", "-c", "import service; print(service.__file__)"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert place.startswith(str(installed))
        for path in (
            "/",
            "/playground/main.js",
            "/playground/samples/star.jpg",
            "/docs",
            "/docs/attention",
        ):
            assert httpx.get(server.http_url + path).status_code == 200, path
        picture = (samples.FOLDER / "star.jpg").read_bytes()
        (found,) = httpx.post(f"{server.http_url}/v1/classify", content=picture).json()["results"]
        assert found["predictions"][0]["label"] == "star"
        scene = next(scenes.FOLDER.glob("*.jpg")).read_bytes()
        (seen,) = httpx.post(f"{server.http_url}/v1/detect", content=scene).json()["results"]
        assert seen["status"] == "ok"
        assert seen["detections"]
