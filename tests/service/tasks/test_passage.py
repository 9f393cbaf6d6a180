"""What the way of one image does with its place in the queue."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import Gauge

from service.errors import InvalidImage
from service.images.decode import Empty
from service.images.decoders import Decoders
from service.tasks.passage import RequestPassage
from tests.service.batching.test_batcher import FAR, opened, value


@pytest.mark.parametrize("upload", [b"", InvalidImage("corrupt", "it was cut")])
async def test_an_image_that_cannot_be_decoded_gives_its_place_to_others_at_once(upload):
    def work(data: bytes, empty: Empty) -> None:
        raise InvalidImage("corrupt", "it has no pixels")

    batcher, metrics = opened(lambda items: items)
    gauge = Gauge("pixels", "of a test", registry=None)
    with (
        Decoders(ThreadPoolExecutor(1), 1, 100, gauge) as decoders,
        batcher.admit(2) as admission,
        decoders.request(2) as decoding,
    ):
        request = RequestPassage(batcher, admission, decoding, FAR, metrics)
        with pytest.raises(InvalidImage):
            async with request.image(upload, 1) as passage:
                await passage.decode(work)
        # The other image of the request keeps its own.
        assert value(metrics.waiting) == 1
    assert value(metrics.waiting) == 0
