"""Clients of others, unmodified, each in a process and an environment of its own.

Their packages do not go with ours: they want other versions, and their messages have the names of
ours in the one pool of descriptors that a process has.
"""

import os
import pickle
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.environments import python_of
from tests.server import ROOT


class Refused(Exception):
    """What a foreign client raised: the name of its type, and its text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class ForeignClient:
    """A process that makes calls with a foreign client."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def call(self, function: str, /, *arguments: object, **options: object) -> Any:
        """What a function of its module returns.

        Raises:
            Refused: the client raised something.
        """
        assert self._process.stdin
        assert self._process.stdout
        pickle.dump((function, arguments, options), self._process.stdin)
        self._process.stdin.flush()
        result, failure = pickle.load(self._process.stdout)
        if failure:
            raise Refused(*failure)
        return result


@contextmanager
def foreign_client(environment: str, module: str, *arguments: str) -> Iterator[ForeignClient]:
    """Run a module of `tests.foreign` with the packages of `bench/pins/<environment>.txt`."""
    process = subprocess.Popen(
        [python_of(environment), "-m", f"tests.foreign.{module}", *arguments],
        cwd=ROOT,
        env=os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield ForeignClient(process)
    finally:
        process.kill()
        process.communicate()
