import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from service import process

# Before torch is imported: several processes of tests share the cores.
os.environ |= process.ENVIRONMENT

import torch

from model import VARIANTS, DatConfig
from model.config import StageConfig
from model.official import official_shapes
from tests import recipe
from tests.faults import SHAPES, Faulty, one_by_one
from tests.server import RunningServer, start_server

process.compute_float32_in_full()  # as the server does, for tests on a GPU

GOLDEN = Path(__file__).parent / "golden"

# Where there is no GPU, kernels are interpreted. Triton asks as it is imported, which torch's
# counter of FLOPs does too.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A script's job in the background ignores it, and so would what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir", type=Path, default=GOLDEN, help="golden cases of the official models"
    )
    parser.addoption(
        "--detector-golden-dir",
        type=Path,
        default=GOLDEN / "det",
        help="golden cases of the official detectors",
    )
    parser.addoption(
        "--segmentation-golden-dir",
        type=Path,
        default=GOLDEN / "seg",
        help="golden cases of the official segmenters",
    )
    parser.addoption(
        "--soak-seconds", type=float, default=60, help="how long `make test-faults` soaks"
    )
    parser.addoption(
        "--crowd-seconds", type=float, default=30, help="how long its crowds ask for too much"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--golden-dir")
        files = sorted(f for f in folder.glob("*.npz") if f.stem != "preprocess")
        quick = {"dat_tiny_224", "dat_pp_tiny_224"}
        if "exact" in metafunc.fixturenames:  # float64 takes its time
            quick = {"dat_tiny_224"}
        parametrize_cases(metafunc, "golden_file", files, quick)
    if "detector_golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--detector-golden-dir")
        files = sorted(f for f in folder.glob("*.npz") if f.stem not in ("ops", "layouts"))
        parametrize_cases(metafunc, "detector_golden_file", files, {"mrcn_tiny", "rtn_tiny"})
    if "segmentation_golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--segmentation-golden-dir")
        files = sorted(f for f in folder.glob("*.npz") if f.stem not in ("ops", "layouts"))
        parametrize_cases(metafunc, "segmentation_golden_file", files, {"fpn_tiny"})


def parametrize_cases(
    metafunc: pytest.Metafunc, name: str, files: list[Path], quick: set[str]
) -> None:
    """Run a test on each golden case; those that are not quick are for `make test-slow`."""
    assert files, f"no golden cases for {name}"
    cases = [
        pytest.param(file, id=file.stem, marks=[] if file.stem in quick else pytest.mark.slow)
        for file in files
    ]
    metafunc.parametrize(name, cases, scope="module")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and repeats_another(item):
            item.add_marker(pytest.mark.slow)
    if "gpu" in config.option.markexpr:
        return
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device; `make test-gpu` insists"))


def repeats_another(item: pytest.Function) -> bool:
    """Whether a test is run again in a way that `make test` compares with the first elsewhere.

    With front ends, whose starts take long: `tests/service/processes` has what is theirs alone,
    and compares the answers of the two shapes of a server. Over JSON and over a stream, which
    differ from HTTP and gRPC in how images are wrapped: `test_contract.py` asks all four.
    """
    if not hasattr(item, "callspec") or "endurance" in item.path.parts:  # those run alone
        return False
    parameters = set(item.callspec.id.split("-"))
    if not parameters.isdisjoint({"many", "many processes", "front ends"}):
        return "processes" not in item.path.parts
    if not parameters.isdisjoint({"over_json", "over_stream"}):
        return item.path.name != "test_contract.py"
    return False


# The two families at a size that costs a test nothing: DAT here, DAT++ as the demo model.
SMALL_DAT = DatConfig(
    "small_dat",
    "dat",
    (
        StageConfig("L", 16, 1),
        StageConfig("S", 32, 2),
        StageConfig("LD", 64, 4, 2, 1, 5),
        StageConfig("LD", 128, 8, 4, 1, 3),
    ),
    (128, 128),
    128,
    num_classes=12,
    window=4,
)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules built here have their parameters and their geometry in this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def recipe_state(config: DatConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Recipe weights under the official names."""
    return {
        key: torch.from_numpy(recipe.tensor(key, shape, seed))
        for key, shape in official_shapes(config).items()
    }


def official_state(name: str, seed: int = 0, **changes: object) -> dict[str, torch.Tensor]:
    """Recipe weights of a variant under the official names."""
    return recipe_state(replace(VARIANTS[name], **changes), seed)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dat_tiny_224` with recipe weights in the form of the official checkpoints."""
    path: Path = tmp_path_factory.mktemp("checkpoint") / "dat_tiny_in1k_224.pth"
    torch.save({"model": official_state("dat_tiny_224"), "epoch": 300}, path)
    return path


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """The server as `make run` starts it, with the demo model."""
    with start_server() as running:
        yield running


@pytest.fixture(scope="session", params=SHAPES)
def slow_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Faulty]:
    """A server that takes one image at a time, as long as a test says."""
    with one_by_one(tmp_path_factory.mktemp("faults"), **SHAPES[request.param]) as running:
        yield running


@pytest.fixture(params=SHAPES)
def fresh_slow_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Faulty]:
    """A server like `slow_server` that has seen nothing yet."""
    with one_by_one(tmp_path, **SHAPES[request.param]) as running:
        yield running
