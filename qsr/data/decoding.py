"""What an image file shows: the one place that opens files with Pillow, for every reader alike.

The pixels are 8-bit RGB of the first picture in the file, in the geometry that Pillow gives it:
TIFF applies its orientation, the other formats leave EXIF's aside, as every published recipe does.
Transparency and colour profiles are left out, of 16 bits the upper 8 are taken. docs/data.md has
the table. What has no scale of its own (floating point, 32 bits) is refused.
"""

import io
import os
import stat
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF", "AVIF", "JPEG2000")
"""Pillow's names of what is read, whatever a file is called. Pillow knows many more; for some it
starts other programs."""

MAX_BYTES = 1 << 30
"""A larger file is not read: more than the largest image takes with 16 bits a channel."""

PNG_END = b"IEND\xaeB\x60\x82"
"""The last chunk of a PNG file. Pillow does without it."""

EIGHT_BITS = frozenset(
    {"1", "L", "P", "LA", "La", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr"}
)
"""Pillow's modes that it converts to RGB without a loss of scale."""

BITS_PER_SAMPLE, WHITE_IS_ZERO, SAMPLE_FORMAT = 258, 262, 339
"""TIFF's tags; the second is 0 where it holds."""


class UndecodableError(ValueError):
    """Why a file is no image that can be used."""


def open_plain(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file; nothing else is waited for or read.

    Raises:
        OSError: it cannot be opened.
        UndecodableError: it is a pipe, a device or a folder, or larger than `MAX_BYTES`.
    """
    # without O_NONBLOCK a pipe that nobody writes to would be waited for
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise UndecodableError(f"{status.st_size:,} bytes, more than any image ({MAX_BYTES:,})")
    raise UndecodableError("not a regular file")


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The RGB image in a file. Raises UndecodableError."""
    try:
        with open_plain(path) as stream:
            data = stream.read()
    except OSError as error:
        raise UndecodableError(f"cannot be read: {error.strerror}") from error
    return decode(data)


def decode(data: bytes) -> Image.Image:
    """The RGB image in a file's contents. Raises UndecodableError."""
    if not data:
        raise UndecodableError("empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = to_rgb(image)
    except UndecodableError:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableError("not an image of a known format") from error
    except Exception as error:  # Pillow's decoders raise many types on a broken file
        raise UndecodableError(f"{type(error).__name__}: {error}") from error
    if image.format == "PNG" and PNG_END not in data:
        raise UndecodableError("truncated: its end is missing")
    return pixels


def defect(path: str | os.PathLike[str]) -> str | None:
    """Why a file cannot be used; None if it can."""
    try:
        read_image(path)
    except UndecodableError as error:
        return str(error)
    return None


def shows_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as an image of a known format does. Raises OSError."""
    try:
        stream = open_plain(path)
    except UndecodableError:
        return False
    try:
        with stream, Image.open(stream, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's readers of headers raise many types
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """What Pillow opened, as 8-bit RGB. Raises UndecodableError if its pixels have no scale of
    their own, and Pillow's errors if it cannot be decoded."""
    image.load()
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if set(tags.get(SAMPLE_FORMAT, (1,))) != {1}:
        raise UndecodableError("signed or floating-point pixels: convert it to 8-bit RGB")
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        if tags.get(BITS_PER_SAMPLE, (16,)) != (16,) or tags.get(WHITE_IS_ZERO) == 0:
            raise UndecodableError("12-bit or inverted 16-bit pixels: convert it to 8-bit RGB")
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in EIGHT_BITS:
        raise UndecodableError(f"pixels of Pillow's mode {image.mode}: convert it to 8-bit RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if "transparency" in image.info:  # else Pillow warns that it is lost
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def as_ppm(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A file's contents anew as a PPM, which every decoder decodes in the same way. Raises
    UndecodableError."""
    image = decode(data.tobytes())
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), dtype=np.uint8)
