"""Where a container may execute what it has written."""

from pathlib import Path


def tmpfs(text: str) -> tuple[Path, bool]:
    """Where Docker mounts a tmpfs such as `/tmp:exec`, and whether what it holds may run."""
    path, _, options = text.partition(":")
    return Path(path), "exec" in options.split(",")


def volume(text: str) -> tuple[Path, bool]:
    """Where Docker mounts a volume such as `name:/path:ro`, and whether it can be written to."""
    _, path, *options = text.split(":")
    return Path(path), "ro" not in options


def runs_code(folder: Path, mounts: dict[Path, bool]) -> bool:
    """Whether what is written into the folder may run, as the innermost mount has it."""
    around = [path for path in mounts if folder.is_relative_to(path)]
    return bool(around) and mounts[max(around, key=lambda path: len(path.parts))]
