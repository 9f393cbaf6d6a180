"""The end of a foreign client's process that takes calls and gives answers, as pickles over pipes.

Runs in the environment of the client, so that it needs nothing but Python.
"""

import os
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any


def answer_calls(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answer until nothing more is asked: a result, or the type and the text of a failure."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a client prints is no answer
    while True:
        try:
            name, arguments, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: tuple[Any, Any] = (functions[name](*arguments, **options), None)
        except Exception as failure:  # the test is to see it
            answer = (None, (type(failure).__name__, str(failure)))
        pickle.dump(answer, answers)
        answers.flush()
