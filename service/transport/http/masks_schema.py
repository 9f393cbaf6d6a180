"""The JSON of masks."""

from base64 import b64encode

from pydantic import BaseModel, Field

from service.tasks.masks import EncodedMask, PngMask, Polygons, RunLengths


class RunLengthsBody(BaseModel):
    """What pycocotools calls a compressed RLE."""

    size: tuple[int, int] = Field(description="Height and width of the image, pixels.")
    counts: str


class PngMaskBody(BaseModel):
    """The part of the image around an object, one bit a pixel, white inside."""

    png: str = Field(description="The PNG file, base64.")
    left: int = Field(description="Column of its top-left corner, pixels.")
    top: int = Field(description="Row of its top-left corner, pixels.")


class MaskBody(BaseModel):
    """The pixels of an object, in the form that was asked for."""

    rle: RunLengthsBody | None = None
    polygon: list[list[tuple[int, int]]] | None = Field(
        None, description="Closed rings of [x, y]; fill them by the even-odd rule."
    )
    png: PngMaskBody | None = None

    @classmethod
    def of(cls, mask: EncodedMask) -> "MaskBody":
        """A mask as the core gives it."""
        match mask:
            case RunLengths():
                return cls(rle=RunLengthsBody(size=mask.image_size, counts=mask.counts))
            case Polygons():
                # Pydantic warns of a list in place of a tuple, in words that Python keeps for ever.
                rings = [list(map(tuple, ring.tolist())) for ring in mask.rings]
                return cls.model_construct(polygon=rings)
            case PngMask():
                text = b64encode(mask.png).decode()
                return cls(png=PngMaskBody(png=text, left=mask.left, top=mask.top))
