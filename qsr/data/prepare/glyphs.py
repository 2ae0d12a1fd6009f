"""A larger real data set that needs no download of images: characters of many hundred fonts.

The fonts are those of Debian's packages. The classes are letters and digits; training and
validation are of different font families, so that a network is validated on fonts that it has never
seen.
"""

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, __version__, features

from qsr.data.datasets import ImageFolder, open_image_folders
from qsr.data.prepare.fonts import Font
from qsr.data.prepare.glyph_drawing import (
    CHARACTERS,
    SIDE,
    Glyphs,
    class_name,
    draw_font,
    drawn,
    names_of,
)
from qsr.data.prepare.progress import show_progress
from qsr.data.prepare.tree import build_tree
from qsr.errors import DataError

PLAIN_STYLES = ("Regular", "Book", "Roman", "Normal", "Medium", "Plain")
MOST_MISSING = 9
"""A font that lacks more of the characters is left out."""
CELL = 4
"""Fonts are compared by the mean grey of cells of this side, in pixels."""
SAME_OUTLINES = 5.0
"""Two fonts are one if their cells differ by less, in grey levels of 255 on average."""
LEAST_READABLE = 0.25
"""A font is no Latin alphabet, but pictures or another script, if a smaller share of its letters is
most like the mean picture of the same letter."""
VAL_SHARE = 0.2

SOURCE = """\
Letters and digits of fonts: grey images of {side}x{side} pixels, white on black, each character cut
to its ink, scaled to the same longer side and centred.

Source: the font packages of Debian; manifest.csv names the package, version, licence and SHA-256 of
every font. Drawn with Pillow {pillow}, FreeType {freetype}.
Split: by family; every family is in train or in val only. The family is the first word of its name.
"""


class Typeface(NamedTuple):
    """A font of the data set."""

    font: Font
    family: str
    glyphs: Glyphs

    @property
    def group(self) -> str:
        """What must not be divided between training and validation: many a family has several
        names with the same first word, such as Lato and Lato Black."""
        return self.family.split()[0].casefold()


def prepare_glyphs(root: str | os.PathLike[str], fonts: Sequence[Font]) -> tuple[int, int]:
    """Write `root` as `train/CLASS/FONT.pgm` and `val/CLASS/FONT.pgm`, and the manifest of the
    fonts; returns the numbers of training and validation images.

    The same fonts give the same bytes. If `root` already exists, nothing is written.

    Raises:
        DataError: `root` contains something else, fontTools is missing, or no font is usable.
    """
    root = Path(root)
    build_tree(root, lambda folder: _write(folder, choose_typefaces(fonts)), check_glyphs)
    train, val = check_glyphs(root)
    return len(train), len(val)


def check_glyphs(root: Path) -> tuple[ImageFolder, ImageFolder]:
    """The splits of `root`. Raises DataError unless it is this data set."""
    try:
        if not (root / "manifest.csv").is_file():
            raise DataError("there is no manifest.csv")
        return open_image_folders(root, expected_classes=len(CHARACTERS))
    except DataError as error:
        raise DataError(
            f"{root} is not the glyphs data set: {error}; remove it and retry"
        ) from error


def choose_typefaces(fonts: Sequence[Font]) -> list[Typeface]:
    """One font of each family, without those that show other things than the Latin letters and
    those with the outlines of an earlier one. Raises DataError if none remains."""
    chosen = _one_of_each_family(fonts)
    faces = []
    with show_progress("fonts", len(chosen), "fonts") as show:
        for number, (family, font) in enumerate(sorted(chosen.items()), start=1):
            face = Typeface(font, family, draw_font(font.path))
            if drawn(face.glyphs).sum() >= len(CHARACTERS) - MOST_MISSING:
                faces.append(face)
            show(number)
    if not faces:
        raise DataError(f"none of {len(fonts)} fonts has the Latin letters: install others")
    return _without_repeated_pictures(_without_same_outlines(_readable(faces)))


def validation_groups(faces: Sequence[Typeface]) -> set[str]:
    """Families for validation, by the hash of their names until a fifth of the images is there."""
    images: dict[str, int] = {}
    for face in faces:
        images[face.group] = images.get(face.group, 0) + int(drawn(face.glyphs).sum())
    wanted, total, val = VAL_SHARE * sum(images.values()), 0, set()
    for group in sorted(images, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total + images[group] <= wanted:
            val.add(group)
            total += images[group]
    return val


def _one_of_each_family(fonts: Sequence[Font]) -> dict[str, Font]:
    """Family -> its plainest font, the first one of several."""
    styles = {name.casefold(): rank for rank, name in enumerate(PLAIN_STYLES)}
    best: dict[str, tuple[int, Font]] = {}
    for font in fonts:
        names = names_of(font.path)
        if names is not None and names[0]:
            family, style = names
            rank = styles.get(style.casefold(), len(styles))
            if family not in best or rank < best[family][0]:
                best[family] = (rank, font)
    return {family: font for family, (_, font) in best.items()}


def _cells(faces: Sequence[Typeface]) -> NDArray[np.float32]:
    """[fonts, characters, cells]: mean grey."""
    shape = (len(faces), len(CHARACTERS), SIDE // CELL, CELL, SIDE // CELL, CELL)
    means = np.stack([face.glyphs for face in faces]).reshape(shape).mean((3, 5))
    cells: NDArray[np.float32] = means.reshape(*shape[:2], -1).astype(np.float32)
    return cells


def _readable(faces: list[Typeface]) -> list[Typeface]:
    letters = [number for number, character in enumerate(CHARACTERS) if character.isalpha()]
    cells = _normalised(_cells(faces)[:, letters])
    shown = np.stack([drawn(face.glyphs)[letters] for face in faces])
    means = _normalised((cells * shown[..., None]).sum(0))
    likest = np.einsum("flc,mc->flm", cells, means).argmax(-1)
    right = (likest == np.arange(len(letters))) & shown
    share = right.sum(1) / np.maximum(shown.sum(1), 1)
    return [face for face, read in zip(faces, share, strict=True) if read >= LEAST_READABLE]


def _normalised(cells: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = cells - cells.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    result: NDArray[np.float32] = centred / np.maximum(length, 1e-6)
    return result


def _without_same_outlines(faces: list[Typeface]) -> list[Typeface]:
    cells = _cells(faces)
    shown = np.stack([drawn(face.glyphs) for face in faces])
    kept: list[int] = []
    for number in range(len(faces)):
        both = shown[kept] & shown[number]
        apart = np.abs(cells[kept] - cells[number]).mean(-1)
        mean = (apart * both).sum(1) / np.maximum(both.sum(1), 1)
        if not (mean < SAME_OUTLINES).any():
            kept.append(number)
    return [faces[number] for number in kept]


def _without_repeated_pictures(faces: list[Typeface]) -> list[Typeface]:
    """A bar is a bar in many fonts: the same picture of a character comes once."""
    seen: set[tuple[int, bytes]] = set()
    result = []
    for face in faces:
        glyphs = face.glyphs.copy()
        for number in np.flatnonzero(drawn(glyphs)):
            picture = (int(number), glyphs[number].tobytes())
            if picture in seen:
                glyphs[number] = 0
            seen.add(picture)
        result.append(face._replace(glyphs=glyphs))
    return result


def _write(root: Path, faces: Sequence[Typeface]) -> None:
    source = SOURCE.format(side=SIDE, pillow=__version__, freetype=features.version("freetype2"))
    (root / "SOURCE.txt").write_text(source)
    val = validation_groups(faces)
    columns = ["number", "split", "family", "images", "file", "sha256"]
    with (root / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*columns, "package", "version", "licence"])
        for number, face in enumerate(faces):
            split = "val" if face.group in val else "train"
            for position in np.flatnonzero(drawn(face.glyphs)):
                folder = root / split / class_name(CHARACTERS[position])
                folder.mkdir(parents=True, exist_ok=True)
                # plain pixels: their bytes do not depend on a compressor's version
                Image.fromarray(face.glyphs[position]).save(folder / f"{number:04d}.pgm")
            images, font = int(drawn(face.glyphs).sum()), face.font
            row = [number, split, face.family, images, font.path.name, font.sha256]
            table.writerow([*row, font.package, font.version, font.licence])
