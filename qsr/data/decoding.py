"""Decoding image files. Only this module opens files with Pillow, so all readers agree.

The result is the first picture in the file as 8-bit RGB, with Pillow's geometry: TIFF orientation
is applied, EXIF orientation is ignored, as in all published recipes. Transparency and colour
profiles are ignored; 16-bit channels keep their upper 8 bits. docs/data.md has the table. Pixels
without a defined range (floating point, 32 bits) are rejected.
"""

import io
import os
import stat
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF", "AVIF", "JPEG2000")
"""Pillow's names of the supported formats; file extensions do not matter. Pillow supports many
more, but runs external programs for some of them."""

MAX_BYTES = 1 << 30
"""Larger files are not read: this is more than the largest image needs at 16 bits per channel."""

PNG_END = b"IEND\xaeB\x60\x82"
"""The last chunk of a PNG file. Pillow does not require it."""

EIGHT_BITS = frozenset(
    {"1", "L", "P", "LA", "La", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr"}
)
"""Pillow's modes that convert to 8-bit RGB without rescaling."""

BITS_PER_SAMPLE, WHITE_IS_ZERO, SAMPLE_FORMAT = 258, 262, 339
"""TIFF tags. The second is PhotometricInterpretation, which is 0 for WhiteIsZero."""


class UndecodableError(ValueError):
    """A file is not a usable image; the message says why."""


def open_plain(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file; never block on or read anything else.

    Raises:
        OSError: it cannot be opened.
        UndecodableError: it is a pipe, a device or a folder, or larger than `MAX_BYTES`.
    """
    # without O_NONBLOCK, opening a pipe without a writer would block
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise UndecodableError(
            f"{status.st_size:,} bytes, larger than any supported image ({MAX_BYTES:,})"
        )
    raise UndecodableError("not a regular file")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The contents of an image's file. Raises UndecodableError."""
    try:
        with open_plain(path) as stream:
            return stream.read()
    except OSError as error:
        raise UndecodableError(f"cannot be read: {error.strerror}") from error


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The RGB image in a file. Raises UndecodableError."""
    return decode(read_file(path))


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
    except Exception as error:  # Pillow's decoders raise many types on broken files
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
    """Whether a file starts with the header of a supported format. Raises OSError."""
    try:
        stream = open_plain(path)
    except UndecodableError:
        return False
    try:
        with stream, Image.open(stream, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's header parsers raise many types
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image opened by Pillow to 8-bit RGB. Raises UndecodableError if its pixels have no
    defined range, and Pillow's errors if it cannot be decoded."""
    image.load()
    tags = getattr(image, "tag_v2", {})  # only TIFF images have it
    if set(tags.get(SAMPLE_FORMAT, (1,))) != {1}:
        raise UndecodableError("signed or floating-point pixels: convert it to 8-bit RGB")
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        if tags.get(BITS_PER_SAMPLE, (16,)) != (16,) or tags.get(WHITE_IS_ZERO) == 0:
            raise UndecodableError("12-bit or inverted 16-bit pixels: convert it to 8-bit RGB")
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in EIGHT_BITS:
        raise UndecodableError(f"pixels in Pillow's mode {image.mode}: convert it to 8-bit RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if "transparency" in image.info:  # otherwise Pillow warns that it is lost
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def as_ppm(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Re-encode a file's contents as PPM, which all decoders read identically. Raises
    UndecodableError."""
    image = decode(data.tobytes())
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), dtype=np.uint8)
