import sys
from pathlib import Path

import pytest

from service.threads import open_pool


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_system_knows_threads_by_their_names():
    with open_pool(1, "decode") as pool:
        assert pool.submit(Path("/proc/thread-self/comm").read_text).result() == "decode_0\n"
