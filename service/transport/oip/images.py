"""The input of a request to images: encoded, as pixels, or normalised."""

from collections.abc import Sequence

from service.errors import InvalidImage, InvalidRequest, TooManyImages, quoted
from service.images.raw import NormalisedPixels, RawPixels
from service.models.card import ModelCard
from service.tasks.core import Upload
from service.transport.base64_text import Base64Decoder
from service.transport.oip.task import TensorFacts
from service.transport.oip.tensors import BYTES, Input, Values, written

IMAGE, PIXELS, NORMALISED = "image", "pixels", "normalised"


def inputs_of(card: ModelCard) -> tuple[TensorFacts, ...]:
    """The inputs of a model, of which a request has one.

    The bytes of files; upright RGB pixels, which are resized as those of a file are; and what the
    network reads, at the size of its input where that is fixed.
    """
    height, width = card.image_size or (-1, -1)
    return (
        TensorFacts(IMAGE, BYTES, (-1, 1)),
        TensorFacts(PIXELS, "UINT8", (-1, -1, -1, 3)),
        TensorFacts(NORMALISED, "FP32", (-1, 3, height, width)),
    )


def read_images(inputs: Sequence[Input], card: ModelCard, max_images: int) -> list[Upload]:
    """The images of a request, in the order of the first axis.

    Raises:
        InvalidRequest: not exactly one input, or one that the model does not have, or not in that
            shape or datatype, or without the values that it says it has.
        TooManyImages: more than `max_images`; they were not read.
    """
    facts = inputs_of(card)
    if len(inputs) != 1:
        got = ", ".join(quoted(given.name) for given in inputs[:2]) or "none"
        raise InvalidRequest(
            f"the request has {len(inputs)} inputs, {got}; expected exactly one of {_listed(facts)}"
        )
    (given,) = inputs
    fact = next((one for one in facts if one.name == given.name), None)
    if fact is None:
        raise InvalidRequest(
            f"{card.name} has no input {quoted(given.name)}; expected one of {_listed(facts)}"
        )
    if given.datatype != fact.datatype:
        raise InvalidRequest(
            f"the input {given.name} has the datatype {quoted(given.datatype)}; expected one of "
            f"{_listed(facts)}"
        )
    if not _fits(given.shape, fact):
        raise InvalidRequest(
            f"the input {given.name} has the shape {written(given.shape)}; expected "
            f"{written(fact.shape)}, where -1 is any size"
        )
    count = given.shape[0]
    if count > max_images:
        raise TooManyImages(f"the request holds {count} images; the limit is {max_images}")
    return _uploads(given, given.read())


def _listed(facts: Sequence[TensorFacts]) -> str:
    return ", ".join(f"{one.name} ({one.datatype} {written(one.shape)})" for one in facts)


def _fits(shape: tuple[int, ...], fact: TensorFacts) -> bool:
    if fact.datatype == BYTES and len(shape) == 1:
        return True  # the other way that clients send a batch of files
    return len(shape) == len(fact.shape) and all(
        expected in (-1, size) for size, expected in zip(shape, fact.shape, strict=True)
    )


def _uploads(given: Input, values: Values) -> list[Upload]:
    if given.name == PIXELS:
        return [RawPixels(pixels) for pixels in values]
    if given.name == NORMALISED:
        return [NormalisedPixels(image) for image in values]
    files = values.ravel().tolist()
    return [_decoded(text) for text in files] if given.in_json else files


def _decoded(text: bytes) -> Upload:
    decoder = Base64Decoder(len(text))
    try:
        decoder.feed(text.decode("utf-8"))
        return decoder.finish()
    except ValueError as error:
        return InvalidImage("bad_base64", f"the image is not base64: {error}")
