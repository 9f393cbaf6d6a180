"""Where this machine's pip finds packages, in the form that an image build takes.

Usage: `python3 deploy/pip_sources.py PIP_CONF`. Writes a pip.conf for the build's `pip_conf` secret
and prints the local paths that it names, one a line, for the build to mount.
"""

import ast
import subprocess
import sys
from pathlib import Path

_SOURCE_OPTIONS = {
    "index-url",
    "extra-index-url",
    "find-links",
    "no-index",
    "cert",
    "client-cert",
    "proxy",
    "trusted-host",
    "timeout",
    "default-timeout",
    "retries",
}


def pip_sources() -> dict[str, str]:
    """The options of `pip install` that say where packages come from; the environment wins."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in sections and option in _SOURCE_OPTIONS:
            sections[section][option] = " ".join(ast.literal_eval(value).split())
    return sections["global"] | sections["install"] | sections[":env:"]


def local_paths(sources: dict[str, str]) -> set[Path]:
    """The existing local paths that a build needs for these sources."""
    paths = set()
    for option, value in sources.items():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # The pages of a file index link to packages beside its folder.
                paths.add(path.parent if option.endswith("index-url") else path)
    return paths


if __name__ == "__main__":
    sources = pip_sources()
    lines = ["[global]", *(f"{option} = {value}" for option, value in sources.items())]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
    sys.stdout.writelines(f"{path}\n" for path in sorted(local_paths(sources)))
