"""An environment for each peer, outside of the repository.

It has exactly the packages of `pins/NAME.txt`, from the package index. What they do not bring, such
as torch, comes from the environment that runs the comparison, and our packages from its checkout:
a path at the end of `sys.path`, so that nothing there hides a package of the peer.

A file of pins is made anew by `pip install` of the peer alone in an empty environment, with numpy
and Pillow as in `constraints.txt` where it allows them, and `pip freeze`.
"""

import subprocess
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

PINS = Path(__file__).parent / "pins"
CACHE = Path.home() / ".cache" / "dat-serve" / "peers"


def python_of(name: str) -> Path:
    """The interpreter of a peer, whose environment is made where there is none with these pins.

    Raises:
        subprocess.CalledProcessError: it cannot be made.
    """
    pins, folder = PINS / f"{name}.txt", CACHE / name
    python, made_of = folder / "bin" / "python", folder / "pins.sha256"
    wanted = sha256(pins.read_bytes()).hexdigest()
    if not made_of.exists() or made_of.read_text() != wanted:
        print(f"{name}: installing into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-qq", "--no-deps", "--requirement", pins],
            check=True,
        )
        made_of.write_text(wanted)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
