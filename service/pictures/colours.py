"""Colours that can be told apart, and seen on any photo.

The palette is that of Okabe and Ito (Color Universal Design, 2008), which people with any kind of
colour-vision deficiency tell apart, with white in the place of black: black is the edge of every
shape. A light halo lies around the dark edge, so that one of the two stands out wherever a shape
lies: no background is closer than 4.5 : 1 to both white and black.
"""

from typing import Final

Colour = tuple[int, int, int]  # sRGB, 0 to 255

BLACK: Final[Colour] = (0, 0, 0)
WHITE: Final[Colour] = (255, 255, 255)
PALETTE: Final[tuple[Colour, ...]] = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
    WHITE,
)


def colour_of(index: int) -> Colour:
    """The colour of a group, a layer or a class; there are eight, and then the first again."""
    return PALETTE[index % len(PALETTE)]


def luminance(colour: Colour) -> float:
    """The relative luminance, 0 to 1 (WCAG 2.2)."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Colour, other: Colour) -> float:
    """The contrast of two colours, 1 to 21 (WCAG 2.2)."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def ink_on(paper: Colour) -> Colour:
    """Black or white, whichever is read better on a colour."""
    return max((BLACK, WHITE), key=lambda ink: contrast(ink, paper))


def hexadecimal(colour: Colour) -> str:
    """A colour as the web writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
