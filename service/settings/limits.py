"""What one request may hold, and all of them together."""

from typing import Literal

from pydantic import Field

from service.machine import cores, memory_bytes
from service.settings.group import DAY_S, MOST_THREADS, Group

Decode = Literal["exact", "fast"]

# What the options of gRPC can hold, less the framing of a message.
_LARGEST_BODY = 2**31 - 2**20


class Limits(Group):
    """What one request may hold."""

    max_image_bytes: int = Field(
        16 * 2**20, gt=0, description="Largest encoded image, bytes; beyond it 413."
    )
    max_body_bytes: int = Field(
        64 * 2**20,
        gt=0,
        le=_LARGEST_BODY,
        description="Largest request body or gRPC message, bytes; beyond it 413.",
    )
    max_bytes_in_flight: int = Field(
        0,
        ge=0,
        description="Most bytes of requests that are received and not yet decoded, over HTTP and "
        "gRPC together; beyond it 429 before a body is read. As many bytes of answers may wait "
        "for clients that do not take them; beyond it the connection with the most is cut. 0: a "
        "quarter of the memory that the process may have.",
    )
    max_pixels: int = Field(
        25_000_000,
        gt=0,
        le=10**9,
        description="Most pixels of an image, read from its header before decoding.",
    )
    max_request_pixels: int = Field(
        100_000_000,
        gt=0,
        description="Most pixels of all images of one request together; beyond it 413.",
    )
    max_pixels_in_flight: int = Field(
        0,
        ge=0,
        description="Most pixels of images that wait to be decoded, of all requests together; "
        "beyond it 429. Those that are segmented count once more until they are answered. 0: four "
        "times those of one request.",
    )
    max_picture_pixels: int = Field(
        20_000_000,
        gt=0,
        le=10**8,
        description="Most pixels of a picture of `visualize`, with the plain image beside it; "
        "beyond it 400. Each counts as four of those that wait to be decoded.",
    )
    max_images: int = Field(32, gt=0, description="Most images in one request.")
    max_streams: int = Field(
        64,
        gt=0,
        description="Most calls of ClassifyStream, DetectStream and SegmentStream at a time; "
        "beyond it RESOURCE_EXHAUSTED. Each may be sending a message, whose bytes count when it is "
        "there.",
    )
    max_shared_memory_bytes: int = Field(
        0,
        ge=0,
        description="Most bytes of POSIX shared memory that clients on the same machine may "
        "register for tensors of the Open Inference Protocol; each client may register any object "
        "in `/dev/shm` that the server may open. 0: none. Needs `DAT_SERVER__FRONT_ENDS=0`.",
    )
    decode_threads: int = Field(
        0,
        ge=0,
        le=MOST_THREADS,
        description="Threads that decode and resize images; 0: one for each core.",
    )
    decode: Decode = Field(
        "exact",
        description="How images of classifiers are decoded: `exact`, as in the official "
        "evaluation; or `fast`, JPEGs of at least twice the needed size at a half, a quarter or "
        "an eighth of theirs, which changes the pixels a little.",
    )
    default_timeout_s: float = Field(
        30.0, gt=0, le=DAY_S, description="Deadline of a request that names none, seconds."
    )

    @property
    def decoders(self) -> int:
        """How many threads decode."""
        return self.decode_threads or cores()

    @property
    def pixels_in_flight(self) -> int:
        """Most pixels of images that wait to be decoded."""
        return self.max_pixels_in_flight or 4 * self.max_request_pixels

    @property
    def bytes_in_flight(self) -> int:
        """Most bytes of requests that are received and not yet decoded."""
        return self.max_bytes_in_flight or max(self.max_body_bytes, memory_bytes() // 4)
