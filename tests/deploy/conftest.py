import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from service.settings.environment import PREFIX
from service.settings.settings import Settings
from tests.deploy.dockerfile import Dockerfile


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def dockerfile(root: Path) -> Dockerfile:
    return Dockerfile(root / "Dockerfile")


@pytest.fixture(scope="session")
def code_folders(dockerfile: Dockerfile) -> set[Path]:
    """Where the image for CUDA keeps compiled code, to load it from there."""
    environment = dockerfile.environment("cuda")
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
    return {Path(environment[name]) for name in names}


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., str]:
    """Run a program that pip does not bring; a machine may lack it, CI may not."""

    def run(name: str, *arguments: str | Path) -> str:
        if shutil.which(name) is None:
            if os.environ.get("CI") == "true":
                pytest.fail(f"{name} is not installed")
            pytest.skip(f"{name} is not installed")
        done = subprocess.run([name, *arguments], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Settings]:
    """The settings of a server whose environment has these variables and no others of ours."""

    def settings(environment: dict[str, str]) -> Settings:
        for name in list(os.environ):
            if name.startswith(PREFIX):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Settings()

    return settings
