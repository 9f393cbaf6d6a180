"""Draws the pictures of `docs/pictures` with a server of demo models: `python -m demo.pictures`.

The server has to run, as `make run` starts it. The same server draws the same bytes again.
"""

import argparse
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
# Its name, the image, and what is asked for.
PICTURES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("arrows", "demo/samples/star.jpg", {"show": "points,arrows", "layers": "2.2"}),
    ("attention", "demo/samples/star.jpg", {"show": "attention,arrows", "layers": "2.2"}),
    (
        "keys",
        "demo/samples/heart.jpg",
        {"show": "keys", "layers": "2.2", "queries": "230,150", "top_n": "4"},
    ),
    (
        "objects",
        "demo/detection/samples/many.jpg",
        {"model": "mask_rcnn_dat_nano", "score_threshold": "0.6"},
    ),
    (
        "beside",
        "demo/samples/flower.jpg",
        {"show": "attention", "layers": "3.1", "layout": "beside", "size": "320"},
    ),
    (
        "thumbnail",
        "demo/detection/samples/many.jpg",
        {"model": "mask_rcnn_dat_nano", "size": "200"},
    ),
)


def draw(url: str, image: Path, options: dict[str, str]) -> bytes:
    """Ask a server for a picture."""
    query = urlencode({"size": "640", "format": "webp"} | options)
    headers = {"Content-Type": "image/jpeg"}
    request = Request(f"{url}/v1/visualize?{query}", image.read_bytes(), headers)
    with urlopen(request) as response:
        file: bytes = response.read()
    return file


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000", help="of the server")
    url = parser.parse_args().url
    FOLDER.mkdir(exist_ok=True)
    for name, image, options in PICTURES:
        (FOLDER / f"{name}.webp").write_bytes(draw(url, ROOT / image, options))


if __name__ == "__main__":
    main()
