"""What is switched for the whole process, before anything is computed in it."""

import gc
import os
import sys
from collections.abc import Mapping
from types import MappingProxyType

# OpenMP's threads wait for each other at the end of every operation. By default they do so awake
# for milliseconds, for a core that a neighbour or our own event loop may have: beside one busy
# process two threads so answered a twentieth of what they do in quiet. A hundred microseconds are
# as fast in quiet (`bench.neighbour`); a thread that sleeps at once is not.
ENVIRONMENT: Mapping[str, str] = MappingProxyType({"GOMP_SPINCOUNT": "2000"})

# How long a thread that wants the interpreter waits before it asks for it, seconds. A forward pass
# on a CPU gives it up and wants it back at each of its hundreds of operations.
_SWITCH_INTERVAL_S = 0.0001


def begin() -> None:
    """Switch it; to be called before torch is imported, which reads the variables once.

    Variables that are set already stay as they are.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def loaded() -> None:
    """Let the collector of garbage pass over all that was loaded; to be called once, when it is.

    Torch and the interfaces are hundreds of thousands of objects that stay for ever, and to look
    through them takes a fifth of a second, in which nobody is answered.
    """
    gc.collect()
    gc.freeze()
