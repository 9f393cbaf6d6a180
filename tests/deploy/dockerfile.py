"""What the Dockerfile says, read as a builder reads it."""

import re
from pathlib import Path

Instruction = tuple[str, str]


class Dockerfile:
    """The stages of a Dockerfile, each with its instructions in order; continued lines joined."""

    def __init__(self, path: Path) -> None:
        text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
        lines = re.sub(r"\\\n\s*", "", text).splitlines()
        self.arguments: dict[str, str] = {}
        self.bases: list[str] = []
        self.stages: dict[str, list[Instruction]] = {}
        for line in filter(str.strip, lines):
            name, rest = line.split(maxsplit=1)
            if name == "FROM":
                base, _, stage = rest.partition(" AS ")
                self.bases.append(base)
                self.stages[stage or "final"] = []
            elif self.stages:
                self.stages[stage or "final"].append((name, rest))
            else:
                variable, _, value = rest.partition("=")
                self.arguments[variable] = value

    def image(self, device: str) -> list[Instruction]:
        """All instructions that make the image for a device, those of its base stages first."""
        names = list(self.stages)
        base, instructions = self.bases[-1], self.stages["final"]
        while (stage := base.replace("${DEVICE}", device)) in names:
            base, instructions = self.bases[names.index(stage)], self.stages[stage] + instructions
        assert base == "${BASE_IMAGE}", f"{base} is neither a stage nor the given base"
        return instructions

    def environment(self, device: str) -> dict[str, str]:
        """The variables that the image for a device sets."""
        values = " ".join(rest for name, rest in self.image(device) if name == "ENV")
        return dict(word.split("=", 1) for word in values.split())
