"""How a peer shares two cores, as its user would choose it."""

import os
from dataclasses import asdict, dataclass, fields
from typing import Self

_PREFIX = "PEER_"


@dataclass(frozen=True)
class Setting:
    """A way to set a peer up; its app reads it from the environment.

    Attributes:
        workers: processes with an engine each.
        threads: of each engine, which decode as well.
        batch: most images that are computed together; 1 batches nothing.
        wait_ms: longest that an image waits for others, milliseconds.
        port: of HTTP.
    """

    workers: int = 1
    threads: int = 2
    batch: int = 8
    wait_ms: int = 1
    port: int = 0

    @classmethod
    def read(cls) -> Self:
        """The setting of this process."""
        given = {field.name: os.environ.get(_PREFIX + field.name.upper()) for field in fields(cls)}
        return cls(**{name: int(value) for name, value in given.items() if value is not None})

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process with this setting; its port is for others to choose."""
        chosen = asdict(self)
        del chosen["port"]
        return {_PREFIX + name.upper(): str(value) for name, value in chosen.items()}

    def __str__(self) -> str:
        """In words, as the table shows it."""
        batch = f"batch {self.batch}, {self.wait_ms} ms" if self.batch > 1 else "no batches"
        return f"{self.workers} x {self.threads} threads, {batch}"
