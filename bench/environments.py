"""Environments outside of the repository, for programs whose packages do not go with ours.

Such programs are the servers that ours is compared with (`bench.peers`) and the clients of others
that ours is tested with (`tests/foreign`). An environment has exactly the packages of
`pins/NAME.txt`, from the package index. What a server that is compared does not bring, such as
torch, comes from the environment that runs it, and our packages from its checkout:
a path at the end of `sys.path`, so that nothing there hides a package of its own.

A file of pins is made anew by `pip install` of the program alone in an empty environment, with
numpy and Pillow as in `constraints.txt` where it allows them, and `pip freeze`.
"""

import fcntl
import subprocess
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

PINS = Path(__file__).parent / "pins"
CACHE = Path.home() / ".cache" / "dat-serve" / "environments"


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made where there is none with these pins.

    Args:
        name: of the file of pins.

    Raises:
        subprocess.CalledProcessError: it cannot be made; pip has said why.
    """
    pins, folder = PINS / f"{name}.txt", CACHE / name
    python, made_of = folder / "bin" / "python", folder / "pins.sha256"
    wanted = sha256(pins.read_bytes()).hexdigest()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests of two processes may want the same one
        if not made_of.exists() or made_of.read_text() != wanted:
            print(f"{name}: installing into {folder}", flush=True)
            own = [sys.executable, "-m"]
            subprocess.run([*own, "venv", "--clear", "--without-pip", str(folder)], check=True)
            install = ["install", "-qq", "--no-deps", "--requirement", str(pins)]
            subprocess.run([*own, "pip", "--python", str(python), *install], check=True)
            made_of.write_text(wanted)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
