import io
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from model.config import VARIANTS
from model.transforms import Preprocessing, to_model_pixels
from service import process
from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.images.containers import Container, read_container
from service.images.decode import _decode_pixels, decode, prepare
from service.settings.limits import Limits
from tests import recipe

LIMITS = Limits()
PREPROCESSING = Preprocessing.of(VARIANTS["dat_tiny_224"])
WIDTH, HEIGHT = 31, 23
FORMATS = ["JPEG", "PNG", "WEBP"]

# As every process of the service does before it decodes.
process.leave_limits_to_us()


def picture(mode="RGB"):
    pixels = recipe.image(0, 7, HEIGHT, WIDTH)
    image = Image.fromarray(np.dstack([pixels, pixels[..., 1] ^ 0x55]))
    return image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)


def encode(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def plain(data):
    """What Pillow alone makes of the bytes."""
    with Image.open(io.BytesIO(data)) as image:
        image.info.pop("transparency", None)  # Pillow warns about it
        return image.convert("RGB")


def chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_head(width, height, depth=8, colour=2, interlace=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)


def png(width, height, rows, *chunks, **header):
    """A PNG from rows of samples as bytes, without filters."""
    content = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    head = png_head(width, height, **header) + b"".join(chunks)
    return head + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def interlaced_png(pixels):
    """The seven passes of Adam7 (W3C PNG, section 8): first row, first column, steps."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    passes.append((1, 0, 2, 1))
    rows = [
        row.tobytes()
        for top, left, down, across in passes
        for row in pixels[top::down, left::across]
        if row.size
    ]
    return png(pixels.shape[1], pixels.shape[0], rows, interlace=1)


def with_exif(image_format, exif):
    """The picture with the bytes of an EXIF block, put where the format has it."""
    if image_format == "PNG":
        data = encode(picture(), "PNG")
        return data[:33] + chunk(b"eXIf", exif) + data[33:]
    if image_format == "WEBP":
        return encode(picture(), "WEBP", exif=exif, lossless=True)
    data = encode(picture(), "JPEG")
    segment = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def exif_block(orientation, order=">", tag=0x0112):
    head = {">": b"MM\0*", "<": b"II*\0"}[order]
    entries = struct.pack(f"{order}IHHHIHxx", 8, 1, tag, 3, 1, orientation)
    return head + entries + bytes(4)


def replaced_jpeg_size(data, width, height):
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def webp(kind, content, rest=b""):
    chunks = kind + struct.pack("<I", len(content)) + content + rest
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def frames():
    return [Image.new("RGB", (20, 12), colour) for colour in ("red", "green", "blue")]


def animation(image_format):
    first, *rest = frames()
    return encode(first, image_format, save_all=True, append_images=rest, lossless=True)


ORDINARY = {
    **{f"jpeg-{mode}": encode(picture(mode), "JPEG") for mode in ("RGB", "L", "CMYK")},
    "jpeg-444": encode(picture(), "JPEG", subsampling=0, quality=95),
    "jpeg-progressive": encode(picture(), "JPEG", progressive=True, restart_marker_blocks=2),
    "jpeg-metadata": encode(
        picture(), "JPEG", icc_profile=b"p" * 70_000, comment=b"c", exif=exif_block(1)
    ),
    "jpeg-trailing": encode(picture(), "JPEG") + b"\xff\xd8 a motion photo",
    "jpeg-padded": encode(picture(), "JPEG").replace(b"\xff\xdb", b"junk\xff\xff\xff\xdb", 1),
    "jpeg-mpo": encode(picture(), "MPO", save_all=True, append_images=frames()),
    **{
        f"png-{mode}": encode(picture(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    },
    "png-P2": encode(picture("P").quantize(4), "PNG", bits=2),
    "png-P-transparent": encode(picture("P"), "PNG", transparency=b"\0\x80\xff"),
    "png-L-transparent": encode(picture("L"), "PNG", transparency=7),
    "png-interlaced": interlaced_png(recipe.image(0, 7, HEIGHT, WIDTH)),
    "png-text": encode(picture(), "PNG", icc_profile=b"p" * 999),
    "webp-lossy": encode(picture(), "WEBP"),
    "webp-lossy-alpha": encode(picture("RGBA"), "WEBP"),
    "webp-lossless": encode(picture(), "WEBP", lossless=True),
    "webp-lossless-alpha": encode(picture("RGBA"), "WEBP", lossless=True, exact=True),
    "webp-metadata": encode(picture(), "WEBP", icc_profile=b"p" * 99, exif=exif_block(1)),
    "png-animated": animation("PNG"),
    "webp-animated": animation("WEBP"),
    **{f"{name}-1x1": encode(Image.new("RGB", (1, 1), "teal"), name) for name in FORMATS},
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_image_decodes_as_with_pillow_alone(name):
    image, expected = decode(ORDINARY[name], LIMITS), plain(ORDINARY[name])
    assert image.mode == "RGB"
    assert image.size == expected.size
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("name", ["png-RGB", "png-interlaced", "webp-lossless"])
def test_a_lossless_image_decodes_to_its_pixels(name):
    pixels = np.asarray(decode(ORDINARY[name], LIMITS))
    np.testing.assert_array_equal(pixels, recipe.image(0, 7, HEIGHT, WIDTH))


def test_cmyk_as_printers_write_it_is_not_inverted():
    image = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), LIMITS)
    np.testing.assert_allclose(np.asarray(image)[8, 8], (255, 0, 0), atol=4)


def test_alpha_is_dropped_not_blended():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert decode(encode(image, "PNG"), LIMITS).getpixel((1, 1)) == (200, 100, 50)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(image_format):
    assert decode(animation(image_format), LIMITS).getpixel((3, 3)) == (255, 0, 0)


def test_sixteen_bits_of_grey_are_scaled_to_eight():
    samples = np.linspace(0, 65_535, 40).astype(">u2").reshape(5, 8)
    data = png(8, 5, [row.tobytes() for row in samples], depth=16, colour=0)
    pixels = np.asarray(decode(data, LIMITS))
    np.testing.assert_array_equal(pixels, np.repeat((samples >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4)])
def test_sixteen_bits_of_colour_are_scaled_to_eight(colour, channels):
    samples = np.linspace(0, 65_535, 40 * channels).astype(">u2").reshape(5, 8, channels)
    data = png(8, 5, [row.tobytes() for row in samples], depth=16, colour=colour)
    np.testing.assert_array_equal(np.asarray(decode(data, LIMITS)), (samples >> 8)[..., :3])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", FORMATS)
def test_the_exif_orientation_is_applied(image_format, orientation, order):
    data = with_exif(image_format, exif_block(orientation, order))
    with Image.open(io.BytesIO(data)) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    image = decode(data, LIMITS)
    assert image.size == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_a_photograph_taken_sideways_is_upright():
    # orientation 6, the usual one: the first row of the file is the right side of the scene
    stored = Image.new("RGB", (40, 20), "black")
    stored.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(encode(stored, "JPEG", exif=exif), LIMITS)
    assert image.size == (20, 40)
    assert image.getpixel((17, 2)) == (255, 255, 255)
    assert image.getpixel((2, 2)) == (0, 0, 0)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize(
    "exif",
    [
        b"MM",
        b"MM\0*",
        b"XX\0*" + exif_block(6)[4:],
        exif_block(0),
        exif_block(9),
        exif_block(6, tag=0x0113),
        exif_block(6)[:14],
        exif_block(6).replace(b"\0\0\0\x08", b"\xff\xff\xff\xff", 1),
        exif_block(6).replace(b"\0\x03\0\0", b"\0\x02\0\0", 1),
        b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 60,
    ],
)
def test_malformed_exif_is_ignored(image_format, exif):
    image = decode(with_exif(image_format, exif), LIMITS)
    assert image.size == (WIDTH, HEIGHT)
    if image_format != "JPEG":
        np.testing.assert_array_equal(np.asarray(image), recipe.image(0, 7, HEIGHT, WIDTH))


def test_exif_in_two_segments_is_read_from_the_first():
    data = with_exif("JPEG", exif_block(6))
    end = data.index(b"\xff\xe0")
    data = data[:end] + b"\xff\xe1\x00\x0cExif\0\0more" + data[end:]
    assert decode(data, LIMITS).size == (HEIGHT, WIDTH)


@settings(deadline=None)
@given(st.sampled_from([b"", b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0"]), st.binary(max_size=200))
def test_no_exif_fails_an_image(head, tail):
    image = decode(with_exif("JPEG", head + tail), LIMITS)
    assert set(image.size) == {WIDTH, HEIGHT}


def reason(data, limits=LIMITS):
    with pytest.raises(ServiceError) as raised:
        decode(data, limits)
    assert isinstance(raised.value, InvalidImage | ImageTooLarge)
    return raised.value.reason


def test_no_bytes_are_empty():
    assert reason(b"") == "empty"


@pytest.mark.parametrize(
    "data",
    [
        *(encode(picture(), name) for name in ("GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000")),
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"<!doctype html><title>404</title>",
        b"just text",
        bytes(1000),
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"\x89PNG",
        b"\xff\xd8",
    ],
    ids=lambda data: repr(data[:8]),
)
def test_other_formats_are_unsupported(data):
    assert reason(data) == "unsupported"


@pytest.mark.parametrize(
    "name", ["jpeg-RGB", "jpeg-progressive", "png-RGB", "png-P", "webp-lossy", "webp-lossless"]
)
def test_every_part_of_a_file_is_truncated(name):
    data = ORDINARY[name]
    signature = 3 if name.startswith("jpeg") else 8 if name.startswith("png") else 12
    reasons = [reason(data[:length]) for length in range(1, len(data))]
    assert set(reasons[: signature - 1]) == {"unsupported"}
    assert set(reasons[signature - 1 :]) == {"truncated"}


@pytest.mark.parametrize("kind", [b"VP8 ", b"VP8L", b"VP8X"])
def test_a_webp_without_room_for_a_header_is_truncated(kind):
    assert reason(webp(kind, b"")) == "truncated"


SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
TRAILERS = {
    "video": b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + recipe.image(0, 1, 40, 40).tobytes(),
    "scans": SCAN * 100 + b"\xff\xd9",
    "segments": b"\xff\xe1\x00\x02" * 20_000,
    "end-in-a-segment": b"\xff\xe1\xff\xff" + b"\xff\xd9" * 9,
    "picture": ORDINARY["jpeg-RGB"] + ORDINARY["jpeg-RGB"],
    "padding": bytes(4096),
    "archive": b"PK\x03\x04\x14\0\0\0\0\0 a.txt",
    "maker": b"\0\0\x01\n\x0e\0\0\0Image_UTC_Data1415\xff\xd8\xffSEFH\x64\0\0\0SEFT",
    "chunks": (chunk(b"eXIf", exif_block(6)) + png_head(9, 9)[8:]) * 6000,
    "riff": b"EXIF" + struct.pack("<I", 26) + exif_block(6) + (b"ANMF" + bytes(4)) * 11_000,
}  # fmt: skip
trailers = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from([*TRAILERS.values(), b"\xff", b"\xd9", b"\xff\xd8"]), max_size=3).map(
        b"".join
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(ORDINARY.values())), trailers)
def test_what_follows_the_end_of_an_image_is_not_the_image(data, trailer):
    assert read_container(data + trailer) == read_container(data)


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("image_format", FORMATS)
def test_an_image_with_a_trailer_decodes_as_without(image_format, trailer):
    data = encode(picture(), image_format)
    image = decode(data + TRAILERS[trailer], LIMITS)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(plain(data)))


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_long_trailer_is_not_copied(image_format):
    data = encode(picture(), image_format) + TRAILERS["segments"] * 200
    limits = Limits(max_image_bytes=len(data))
    tracemalloc.start()
    try:
        assert decode(data, limits).size == (WIDTH, HEIGHT)
        assert tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["jpeg-RGB", "jpeg-progressive"])
def test_padding_does_not_complete_a_jpeg(name):
    data = ORDINARY[name]
    start = data.index(b"\xff\xda")
    for length in range(start, len(data)):
        assert reason(data[:length] + bytes(9)) == "truncated"


def between_scans(data, segment):
    """Put a segment before every scan of a JPEG but the first, with its tables if it has some."""
    start = data.index(b"\xff\xda") + 2
    return data[:start] + data[start:].replace(b"\xff\xda", segment + b"\xff\xda")


@pytest.mark.parametrize("marker", [0xDC, 0xE0, 0xE1, 0xE2, 0xED, 0xEF, 0xFE])
def test_what_looks_like_an_end_inside_a_segment_between_scans_is_none(marker):
    content = SCAN * 60 + b"\xff\xd9" + ORDINARY["jpeg-RGB"]
    segment = b"\xff\xff%c%b%b" % (marker, struct.pack(">H", len(content) + 2), content)
    whole = between_scans(ORDINARY["jpeg-progressive"], segment)
    assert whole.count(segment) > 3
    image = decode(whole, LIMITS)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(plain(whole)))
    end = whole.rindex(b"\xff\xd9")
    assert reason(whole[:end]) == "truncated"
    assert read_container(whole + b"\xff\xd9").data.endswith(whole[-99:])


def test_damage_that_looks_like_a_segment_longer_than_the_file_is_none():
    data = ORDINARY["jpeg-444"]
    stuffed = data.index(b"\xff\x00", data.index(b"\xff\xda"))
    damaged = data[:stuffed] + b"\xff\xe1\xff\xff" + data[stuffed + 4 :]
    image = decode(damaged, LIMITS)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(plain(damaged)))


def test_restart_markers_are_no_parts():
    stored = Image.fromarray(recipe.image(0, 7, 900, 900)[..., 0])
    data = encode(stored, "JPEG", restart_marker_blocks=1)
    assert sum(data.count(b"\xff%c" % marker) for marker in range(0xD0, 0xD8)) > 12_000
    image = decode(data + TRAILERS["scans"], LIMITS)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(plain(data)))


def test_a_webp_of_an_odd_size_ends_behind_its_padding():
    data = ORDINARY["webp-lossless"]
    odd = data[:4] + struct.pack("<I", len(data) - 9) + data[8:]
    assert len(read_container(odd + TRAILERS["riff"]).data) == len(data)


PIXELS = b"\0\1\2\3"
JPEG = ORDINARY["jpeg-RGB"]
FRAME = JPEG[JPEG.index(b"\xff\xc0") : JPEG.index(b"\xff\xc0") + 19]
HUGE_FRAME = replaced_jpeg_size(FRAME, 65_000, 65_000)
END = chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        JPEG.replace(b"\xff\xc4", b"\xff\xd9", 1),
        JPEG.replace(b"\xff\xc4", b"\xff\xd8", 1),
        JPEG.replace(b"\xff\xc4\x00\x1f", b"\xff\xc4\x00\x1e", 1),
        JPEG.replace(b"\xff\xc4\x00\x1f", b"\xff\xc4\x00\x01", 1),
        JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c", 1),
        JPEG.replace(FRAME, b""),
        JPEG.replace(FRAME, FRAME * 2),
        JPEG.replace(FRAME, FRAME + HUGE_FRAME),
        JPEG[:2] + b"\xff\xfe\x00\x01" + JPEG[2:],
        JPEG.replace(FRAME, b"\xff\xc0\x00\x04\x08\x00"),
        replaced_jpeg_size(JPEG, 0, 9),
        png_head(1, 1) + END,
        png_head(0, 1) + chunk(b"IDAT", zlib.compress(b"")) + END,
        png(1, 1, [PIXELS], depth=5),
        png(1, 1, [PIXELS], colour=9),
        png(1, 1, [PIXELS[1:]]).replace(b"IHDR", b"JHDR"),
        png(1, 1, [PIXELS[1:]], png_head(2, 2)[8:]),
        png(1, 1, [PIXELS[1:]], chunk(b"IHDR", b"\0\0\0\1")),
        png_head(1, 1) + chunk(b"IDAT", b"not zlib") + END,
        png_head(1, 1)[:-1] + b"?" + chunk(b"IDAT", zlib.compress(PIXELS)) + END,
        webp(b"VP8 ", bytes(40)),
        webp(b"VP8L", bytes(40)),
        webp(b"VP8X", bytes(40)),
        webp(b"ALPH", bytes(40)),
        ORDINARY["webp-lossless"][:40] + bytes(len(ORDINARY["webp-lossless"]) - 40),
    ],
    ids=lambda data: repr(data[:8]),
)
def test_malformed_files_are_corrupt(data):
    assert reason(data) == "corrupt"


@pytest.mark.parametrize("marker", [0xDE, 0xF0, 0xFD, 0xC8, 0x02])
def test_only_the_frame_that_was_checked_is_believed(marker):
    # Pillow would take the size from a frame inside these segments.
    hidden = b"\xff%c\x00\x15%b" % (marker, HUGE_FRAME)
    image = decode(JPEG.replace(FRAME, FRAME + hidden), LIMITS)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(plain(JPEG)))


def test_a_decoder_that_sees_another_size_is_refused():
    with pytest.raises(InvalidImage, match="two sizes"):
        _decode_pixels(Container("JPEG", WIDTH, HEIGHT - 1, 1, JPEG))


def test_a_file_over_the_byte_limit_is_refused():
    data = ORDINARY["png-RGB"]
    assert decode(data, Limits(max_image_bytes=len(data))).size == (WIDTH, HEIGHT)
    assert reason(data, Limits(max_image_bytes=len(data) - 1)) == "too_large"


@pytest.mark.parametrize("name", ["jpeg-RGB", "png-RGB", "webp-lossy", "webp-lossless"])
def test_a_picture_over_the_pixel_limit_is_refused(name):
    pixels = WIDTH * HEIGHT
    assert decode(ORDINARY[name], Limits(max_pixels=pixels)).size == (WIDTH, HEIGHT)
    assert reason(ORDINARY[name], Limits(max_pixels=pixels - 1)) == "too_many_pixels"


VP8_SIZE = b"\x30\x01\x00\x9d\x01\x2a" + struct.pack("<HH", 0x3FFF, 0x3FFF)
BOMBS = {
    "png": png_head(20_000, 20_000) + chunk(b"IDAT", b"") + END,
    "png-largest": png_head(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", b"") + END,
    "jpeg": replaced_jpeg_size(JPEG, 65_500, 65_500),
    "webp-lossy": webp(b"VP8 ", VP8_SIZE + bytes(20)),
    "webp-lossless": webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(20)),
    "webp-extended": webp(b"VP8X", bytes(4) + b"\xff" * 6 + bytes(20)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pixel_bomb_is_refused_by_its_header(name):
    # None of these has pixels: a decoder would have called them corrupt.
    assert len(BOMBS[name]) < 2000
    assert reason(BOMBS[name]) == "too_many_pixels"


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536)])
def test_a_side_that_resizing_cannot_afford_is_refused(size):
    assert reason(encode(Image.new("1", size), "PNG")) == "too_many_pixels"
    longest = min(size[0], 65_535), min(size[1], 65_535)
    assert decode(encode(Image.new("1", longest), "PNG"), LIMITS).size == longest


MEGABYTE = zlib.compress(bytes(2**20))
UNPACKING = {
    "text": [chunk(b"zTXt", b"k%d\0\0" % i + MEGABYTE) for i in range(60)],
    "international-text": [chunk(b"iTXt", b"k\0\1\0\0\0" + MEGABYTE)] * 60,
    "profile": [chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**25)))],
}


@pytest.mark.parametrize("name", UNPACKING)
def test_metadata_of_a_png_is_never_unpacked(name):
    data = png(1, 1, [PIXELS[1:]], *UNPACKING[name])
    tracemalloc.start()
    try:
        assert decode(data, LIMITS).getpixel((0, 0)) == (1, 2, 3)
        assert tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()


def test_the_pixels_of_a_png_are_unpacked_no_further_than_its_size():
    content = zlib.compress(bytes(2**25))
    data = png_head(1, 1) + chunk(b"IDAT", content) + END
    tracemalloc.start()
    try:
        assert decode(data, LIMITS).getpixel((0, 0)) == (0, 0, 0)
        assert tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()


SCANS = ORDINARY["jpeg-progressive"]
LAST_SCAN = SCANS[SCANS.rindex(b"\xff\xda") : -2]


@pytest.mark.parametrize(
    "data",
    [
        JPEG[:2] + b"\xff\xe2\x00\x02" * 10_000 + JPEG[2:],
        JPEG[:2] + b"\xff\xd0" * 10_000 + JPEG[2:],
        JPEG[:2] + b"\xff" * 10_000 + JPEG[2:],
        JPEG[:2] + (b"\xff\xee\xff\xff" + bytes(65_533)) * 5 + JPEG[2:],
        SCANS[:-2] + LAST_SCAN * 50 + SCANS[-2:],
        png_head(1, 1) + chunk(b"IDAT", b"") * 10_000 + END,
        webp(b"VP8X", bytes(10), (b"ANMF" + bytes(4)) * 10_000),
    ],
    ids=["segments", "restarts", "padding", "header", "scans", "chunks", "frames"],
)
def test_a_file_in_very_many_parts_is_refused(data):
    assert reason(data) == "unsupported"


def refreshed(data):
    """Put the checksums of a PNG and the length of a WebP right, so that decoding goes on."""
    if data.startswith(b"RIFF"):
        return data[:4] + struct.pack("<I", max(len(data) - 8, 0)) + data[8:]
    if not data.startswith(b"\x89PNG"):
        return data
    parts, position = [data[:8]], 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        content = data[position + 8 : position + 8 + length]
        if len(content) < length:
            break
        parts.append(chunk(kind, content))
        position += 12 + length
    return b"".join(parts) + data[position:]


places = st.floats(0, 1, exclude_max=True).map(lambda fraction: fraction**3)
edits = st.tuples(places, st.integers(0, 9), st.binary(max_size=9))


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from(list(ORDINARY.values())),
    st.lists(edits, min_size=1, max_size=5),
    st.booleans(),
)
def test_hostile_bytes_are_an_image_or_one_of_our_errors(data, changes, refresh):
    for place, removed, inserted in changes:
        position = int(place * len(data))
        data = data[:position] + inserted + data[position + removed :]
    if refresh:
        data = refreshed(data)
    try:
        image = decode(data, Limits(max_pixels=100_000))
    except (InvalidImage, ImageTooLarge):
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= 100_000


@pytest.mark.parametrize("image_format", FORMATS)
def test_preparing_gives_the_pixels_of_the_model_and_the_way_back(image_format):
    data = with_exif(image_format, exif_block(6))
    prepared = prepare(data, LIMITS, PREPROCESSING)
    assert (prepared.width, prepared.height) == (HEIGHT, WIDTH)
    assert prepared.pixels.shape == (224, 224, 3)
    assert prepared.pixels.dtype == np.uint8
    assert prepared.pixels.flags.c_contiguous
    assert prepared.pixels.flags.writeable
    expected = to_model_pixels(decode(data, LIMITS), PREPROCESSING)
    np.testing.assert_array_equal(prepared.pixels, expected)
    corners = prepared.pixel_map.to_image([(-16, -16), (240, 240)])
    np.testing.assert_allclose(corners, [(0, 0), (HEIGHT, WIDTH)])


FAST = Limits(decode="fast")
TALL, WIDE = Preprocessing((160, 80), (180, 90)), Preprocessing((80, 160), (90, 180))


@pytest.mark.parametrize(
    ("least", "size"),
    [(12, (31, 23)), (11, (16, 12)), (6, (16, 12)), (5, (8, 6)), (3, (8, 6)), (2, (4, 3))],
)
def test_a_jpeg_is_decoded_at_the_least_size_that_suffices(least, size):
    assert _decode_pixels(read_container(JPEG), (least, least)).size == size


@pytest.mark.parametrize("name", ORDINARY)
def test_fast_pixels_of_a_small_image_are_the_exact_ones(name):
    data = ORDINARY[name]
    np.testing.assert_array_equal(
        prepare(data, FAST, PREPROCESSING).pixels, prepare(data, LIMITS, PREPROCESSING).pixels
    )


LARGE = recipe.image(0, 5, 1100, 1100)
large_sides = st.integers(512, 1100)
codings = st.fixed_dictionaries(
    {"quality": st.integers(60, 95), "subsampling": st.sampled_from([0, 1, 2])}
)


@settings(max_examples=40, deadline=None)
@given(large_sides, large_sides, st.integers(1, 8), codings)
def test_fast_pixels_are_near_the_exact_ones(width, height, orientation, coding):
    picture = Image.fromarray(np.ascontiguousarray(LARGE[:height, :width]))
    data = encode(picture, "JPEG", exif=b"Exif\0\0" + exif_block(orientation), **coding)
    exact, fast = prepare(data, LIMITS, PREPROCESSING), prepare(data, FAST, PREPROCESSING)
    error = np.abs(fast.pixels.astype(int) - exact.pixels)
    assert 0 < error.mean() < 4
    assert np.percentile(error, 99) < 16
    assert (fast.width, fast.height) == (exact.width, exact.height)
    assert fast.pixel_map == exact.pixel_map


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_fast_picture_lies_where_the_exact_one_does(orientation):
    # An eighth of the size is 256 pixels and the part of one. Were it taken for 257, the picture
    # would shrink towards a corner, its centre by 0.4 pixels.
    stored = Image.new("L", (2049, 2049))
    for start in (300, 1000, 1700):
        stored.paste(255, (start, start, start + 80, start + 80))
    data = encode(stored, "JPEG", exif=b"Exif\0\0" + exif_block(orientation))

    def centre(limits):
        pixels = prepare(data, limits, PREPROCESSING).pixels[..., 0].astype(float)
        return [(place * pixels).sum() / pixels.sum() for place in np.indices(pixels.shape)]

    np.testing.assert_allclose(centre(FAST), centre(LIMITS), rtol=0, atol=0.06)


@pytest.mark.parametrize(("preprocessing", "reduced"), [(TALL, True), (WIDE, False)])
def test_the_least_size_is_that_of_the_upright_image(preprocessing, reduced):
    # upright, this one is 200 x 400
    picture = Image.fromarray(recipe.image(0, 6, 200, 400))
    data = encode(picture, "JPEG", exif=b"Exif\0\0" + exif_block(6))
    exact, fast = (prepare(data, limits, preprocessing).pixels for limits in (LIMITS, FAST))
    assert (exact != fast).any() == reduced


TINY = Preprocessing((4, 4), (5, 5))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([data for name, data in ORDINARY.items() if name.startswith("jpeg")]),
    st.lists(edits, max_size=5),
)
def test_fast_decoding_refuses_what_exact_decoding_does(data, changes):
    for place, removed, inserted in changes:
        position = int(place * len(data))
        data = data[:position] + inserted + data[position + removed :]

    def outcome(limits):
        try:
            prepared = prepare(data, limits, TINY)
        except (InvalidImage, ImageTooLarge) as error:
            return error.reason
        return prepared.width, prepared.height, prepared.pixels.shape

    limits = Limits(max_pixels=100_000)
    assert outcome(limits.model_copy(update={"decode": "fast"})) == outcome(limits)


def test_threads_do_not_disturb_each_other():
    files = list(ORDINARY.values()) * 3
    alone = [prepare(data, LIMITS, PREPROCESSING).pixels for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: prepare(data, LIMITS, PREPROCESSING).pixels, files))
    np.testing.assert_array_equal(together, alone)
