"""The README's commands, as a reader would paste them."""

import json
import re
import subprocess
import sys

import pytest

from model import DAT, VARIANTS
from model.cost import cost
from service.errors import ServiceError
from tests.server import ROOT
from tests.service.test_errors import all_errors

README = (ROOT / "README.md").read_text("utf-8")
CURL = [line[2:] for line in README.splitlines() if line.startswith("$ curl")]
(GRPC,) = re.findall(r"```python\n(import grpc\n.*?)```", README, re.DOTALL)


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", CURL)
def test_curl(server, command):
    here = command.replace("localhost:8000", server.http_url.removeprefix("http://"))
    answer = json.loads(run(["bash", "-c", here.replace("curl ", "curl -sS ", 1)]))
    assert all(result["status"] == "ok" for result in answer["results"])


def test_grpc(server):
    printed = run([sys.executable, "-c", GRPC.replace("localhost:8001", server.grpc_target)])
    assert "star" in printed


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("error", list(all_errors()), ids=lambda e: e.__name__)
def test_every_error_is_in_the_table(error: type[ServiceError]):
    row = f"| `{error.code}` | {int(error.http_status)} | {error.grpc_code.name} | "
    assert row in README


def test_the_table_of_variants_says_what_the_modules_cost():
    rows = re.findall(r"`(dat_(?:pp_)?\w+_\d{3})` \| (\d+) \| ([\d.]+) M \| ([\d.]+) G", README)
    assert {name for name, *_ in rows} == {
        name for name in VARIANTS if name.endswith(("_224", "_384"))
    }
    for name, size, parameters, flops in rows:
        config = VARIANTS[name]
        assert config.image_size == (int(size), int(size))
        found = cost(DAT(config))
        assert f"{found.parameters / 1e6:.1f}" == parameters, name
        assert f"{found.flops / 1e9:.1f}" == flops, name
