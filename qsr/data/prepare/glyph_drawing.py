"""Drawing the characters of one font as small grey pictures."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from qsr.errors import DataError

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

Glyphs = NDArray[np.uint8]
"""[characters, side, side]: white ink on black, all black where there is no picture."""

# Every picture is cut to the ink and scaled to the same size, so that thin and small fonts fill it
# as others do. That hides what only size or position tells, and those characters are left out: 0
# and o beside O, l beside I, and the small letters that are small capitals (c, k, p, s, u, v, w, x,
# y, z). What stays can be told by its shape.
CHARACTERS = "123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijmnqrt"

SIDE = 32
INK = 28
"""Longer side of the ink in the picture, in pixels."""
DRAWN = 96
"""Size at which fonts are drawn before the picture is scaled, in pixels."""
FAINT = 128
"""A picture without a pixel as bright is blank."""
ALIKE = 12.0
"""A small letter is a small capital if its picture differs by less from the capital's, in grey
levels of 255 on average."""


def class_name(character: str) -> str:
    """The class folder; names that differ in more than case, for file systems that ignore it."""
    if character.isdigit():
        return f"digit_{character}"
    return f"{'upper' if character.isupper() else 'lower'}_{character.lower()}"


def names_of(path: Path) -> tuple[str, str] | None:
    """Family and style of a font file; None if it is broken or has no names."""
    try:
        with _open(path) as font:
            names = font["name"]
            family = names.getDebugName(16) or names.getDebugName(1)
            style = names.getDebugName(17) or names.getDebugName(2)
    except DataError:
        raise
    except Exception:  # fontTools raises many types on a broken file
        return None
    return (str(family).strip(), str(style or "").strip()) if family else None


def draw_font(path: Path) -> Glyphs:
    """A picture of each of the characters; black if the font has none, or cannot be used.

    Characters that the font shows with the same picture are left out too: boxes for what is
    missing, capitals for small letters.
    """
    glyphs = np.zeros((len(CHARACTERS), SIDE, SIDE), np.uint8)
    mapped = _code_points(path)
    try:
        font = ImageFont.truetype(path, DRAWN, layout_engine=ImageFont.Layout.BASIC)
        for number, character in enumerate(CHARACTERS):
            if ord(character) in mapped:
                glyphs[number] = _draw(font, character)
    except OSError:  # FreeType refuses the file
        return np.zeros_like(glyphs)
    _drop_repeated(glyphs)
    _drop_small_capitals(glyphs)
    return glyphs


def drawn(glyphs: Glyphs) -> NDArray[np.bool_]:
    """[...]: which pictures of [..., side, side] show something."""
    shown: NDArray[np.bool_] = glyphs.max(axis=(-2, -1)) > 0
    return shown


def _open(path: Path) -> "TTFont":
    try:
        from fontTools.ttLib import TTFont  # an optional dependency
    except ImportError as error:
        raise DataError("reading fonts needs fontTools: pip install fonttools") from error
    logging.getLogger("fontTools").setLevel(logging.CRITICAL)  # it comments on odd tables
    return TTFont(path, lazy=True)


def _code_points(path: Path) -> set[int]:
    """The code points that the font has a glyph for."""
    try:
        with _open(path) as font:
            return set(font.getBestCmap() or ())
    except DataError:
        raise
    except Exception:  # as above
        return set()


def _draw(font: ImageFont.FreeTypeFont, character: str) -> NDArray[np.uint8]:
    """[side, side]; black if the character is blank, or absurdly large."""
    picture = np.zeros((SIDE, SIDE), np.uint8)
    left, top, right, bottom = map(round, font.getbbox(character))
    width, height = right - left, bottom - top
    if not (0 < width < 10 * DRAWN and 0 < height < 10 * DRAWN):
        return picture
    canvas = Image.new("L", (width + 2, height + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), character, fill=255, font=font)
    ink = canvas.getbbox()
    if ink is None:
        return picture
    cut = canvas.crop(ink)
    scale = INK / max(cut.size)
    size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    small = np.asarray(cut.resize(size, Image.Resampling.BILINEAR))
    if small.max() < FAINT:
        return picture
    x, y = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    picture[y : y + size[1], x : x + size[0]] = small
    return picture


def _drop_repeated(glyphs: Glyphs) -> None:
    positions: dict[bytes, list[int]] = {}
    for number, picture in enumerate(glyphs):
        positions.setdefault(picture.tobytes(), []).append(number)
    for same in positions.values():
        if len(same) > 1:
            glyphs[same] = 0


def _drop_small_capitals(glyphs: Glyphs) -> None:
    """i and j, in thin fonts like I and J but for the dot, go with most of the others."""
    small = [character for character in CHARACTERS if character.islower()]
    others = [character for character in small if character not in "ij"]
    alike = [character for character in others if _is_small_capital(glyphs, character)]
    dropped = small if 2 * len(alike) > len(others) else alike
    glyphs[[CHARACTERS.index(character) for character in dropped]] = 0


def _is_small_capital(glyphs: Glyphs, character: str) -> bool:
    small, capital = (glyphs[CHARACTERS.index(c)] for c in (character, character.upper()))
    return bool(np.abs(small.astype(np.int16) - capital).mean() < ALIKE)
