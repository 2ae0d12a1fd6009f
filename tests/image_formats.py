"""Image files of every kind that is read or refused, and the pixels that they show.

The pixels are what was put in, not what some decoder said.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.image_trees import encoded

Pixels = NDArray[np.uint8]

SIDE = 32
"""Of every image, in pixels."""

EXACT, LOSSY = 0, 6
"""Tolerances, in grey levels."""


def _picture() -> Pixels:
    """[SIDE, SIDE, 3]: smooth, in colour, and different from all its mirror images."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    planes = (250 * x * x, 250 * y, 125 + 120 * np.sin(3 * x + 5 * y * y))
    return np.stack(planes, axis=-1).astype(np.uint8)


COLOUR = _picture()
GREY = COLOUR[..., 2]
IMAGE, GREY_IMAGE = Image.fromarray(COLOUR), Image.fromarray(GREY)
OTHER = Image.fromarray(255 - COLOUR)
ALPHA = COLOUR[..., 0]
INKS = np.dstack([COLOUR, GREY // 2])
CUT = ((COLOUR >> 3 << 3) | (COLOUR >> 5)).astype(np.uint8)
"""`COLOUR` as a format with five bits a channel gives it."""


class Kind(NamedTuple):
    """One kind of file."""

    format: str
    variant: str
    data: bytes
    pixels: Pixels | None
    """[SIDE, SIDE, 3], what it shows; None if it is refused."""
    taken: str = "as stored"
    tolerance: int = EXACT


def grey(values: Pixels) -> Pixels:
    return np.repeat(values[..., None], 3, axis=-1)


def from_inks(inks: Pixels) -> Pixels:
    """RGB [.., 3] of cyan, magenta, yellow and black [.., 4]."""
    free = 255 - inks.astype(np.int32)
    return np.round(free[..., :3] * free[..., 3:] / 255).astype(np.uint8)


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """Upright, by the definition of the EXIF tag of that name."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows = {1: 1, 2: 1, 3: -1, 4: -1, 5: 1, 6: 1, 7: -1, 8: -1}[orientation]
    columns = {1: 1, 2: -1, 3: -1, 4: 1, 5: 1, 6: -1, 7: -1, 8: 1}[orientation]
    return pixels[::rows, ::columns]


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png(
    values: NDArray[Any], depth: int, colour: int, *chunks: bytes, adam7: bool = False
) -> bytes:
    """A PNG of values [h, w, channels] with `depth` bits each, which Pillow would not write."""
    height, width = values.shape[:2]
    passes = [(0, 0, 1, 1)]
    if adam7:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)]
        passes += [(0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b"".join(
        b"\0" + _packed(row.reshape(-1), depth)
        for top, left, down, right in passes
        for row in values[top::down, left::right]
    )
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(adam7))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def _packed(row: NDArray[Any], depth: int) -> bytes:
    if depth == 16:
        return row.astype(">u2").tobytes()
    bits = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
    return np.packbits(bits.reshape(-1)).tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bmp16(pixels: Pixels) -> bytes:
    """Five bits a channel, the first line on top."""
    five = (pixels >> 3).astype(np.uint16)
    body = (five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2]).astype("<u2").tobytes()
    height, width = pixels.shape[:2]
    info = struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 16, 0, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + info + body


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def tiff(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "TIFF", **options)


def without_adobe(data: bytes) -> bytes:
    """A JPEG without its Adobe marker."""
    start = data.index(b"\xff\xee")
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    return data[:start] + data[start + 2 + length :]


def ycck() -> bytes:
    """The colours in luminance and differences, the black empty; Adobe's transform is 2."""
    values = 255 - np.asarray(IMAGE.convert("YCbCr"))
    inks = Image.fromarray(np.dstack([values, np.zeros_like(GREY)]), mode="CMYK")
    data = bytearray(encoded(inks, "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def jpegs() -> Iterator[Kind]:
    fine: dict[str, Any] = {"quality": 100, "subsampling": 0}
    cmyk = encoded(Image.fromarray(INKS, mode="CMYK"), "JPEG", quality=100)

    def kind(variant: str, data: bytes, pixels: Pixels = COLOUR, taken: str = "as stored") -> Kind:
        return Kind("JPEG", variant, data, pixels, taken, LOSSY)

    yield kind("baseline", encoded(IMAGE, "JPEG", **fine))
    yield kind("progressive", encoded(IMAGE, "JPEG", progressive=True, **fine))
    yield kind("grey", encoded(GREY_IMAGE, "JPEG", **fine), grey(GREY))
    yield kind("stored as RGB", encoded(IMAGE, "JPEG", keep_rgb=True, **fine))
    yield kind("with a colour profile", encoded(IMAGE, "JPEG", icc_profile=b"icc" * 99, **fine))
    several = encoded(IMAGE, "MPO", save_all=True, append_images=[OTHER.copy()], **fine)
    yield kind("several pictures (MPO)", several, COLOUR, "the first picture")
    taken = "the colours of the inks, without a profile"
    yield kind("CMYK", cmyk, from_inks(INKS), taken)
    yield kind("CMYK without Adobe's marker", without_adobe(cmyk), from_inks(INKS), taken)
    yield kind("YCCK", ycck(), 255 - COLOUR, taken)
    for orientation in range(2, 9):
        data = encoded(IMAGE, "JPEG", exif=rotated(orientation), **fine)
        yield kind(f"EXIF orientation {orientation}", data, COLOUR, "as stored, not turned")


def pngs() -> Iterator[Kind]:
    wide = COLOUR.astype(np.uint16) * 256 + 7
    inverse = bytes(range(255, -1, -1)) * 3
    colours = np.frombuffer(inverse, np.uint8).reshape(3, 256).T
    palette = chunk(b"PLTE", colours.tobytes())
    alpha, drop = ALPHA[..., None], "the colours, without the transparency"
    high = "the upper 8 bits of each value"

    def kind(
        variant: str, data: bytes, pixels: Pixels | None = COLOUR, taken: str = "as stored"
    ) -> Kind:
        return Kind("PNG", variant, data, pixels, taken)

    yield kind("colour", png(COLOUR, 8, 2))
    yield kind("interlaced", png(COLOUR, 8, 2, adam7=True))
    for depth in (1, 2, 4, 8):
        values = ((GREY >> (8 - depth)) * (255 // (2**depth - 1))).astype(np.uint8)
        yield kind(f"{depth}-bit grey", png(GREY >> (8 - depth), depth, 0), grey(values))
    yield kind("palette", png(GREY, 8, 3, palette), colours[GREY])
    gamma = chunk(b"gAMA", struct.pack(">I", 220000)) + chunk(b"sRGB", b"\0")
    yield kind("gamma and colour space", png(COLOUR, 8, 2, gamma))
    yield kind("alpha", png(np.dstack([COLOUR, ALPHA]), 8, 6), COLOUR, drop)
    yield kind("grey and alpha", png(np.dstack([GREY[..., None], alpha]), 8, 4), grey(GREY), drop)
    part = chunk(b"tRNS", bytes(range(256)))
    yield kind("palette with alpha", png(GREY, 8, 3, palette, part), colours[GREY], drop)
    key = chunk(b"tRNS", struct.pack(">HHH", *COLOUR[3, 4].tolist()))
    yield kind("a transparent colour", png(COLOUR, 8, 2, key), COLOUR, drop)
    yield kind("colour of 16 bits", png(wide, 16, 2), COLOUR, high)
    yield kind("grey of 16 bits", png(wide[..., 2], 16, 0), grey(GREY), high)
    turned_by_exif = chunk(b"eXIf", rotated(6).tobytes().removeprefix(b"Exif\0\0"))
    data = png(COLOUR, 8, 2, turned_by_exif)
    yield kind("EXIF orientation", data, COLOUR, "as stored, not turned")
    animated = encoded(IMAGE, "PNG", save_all=True, append_images=[OTHER.copy()])
    yield kind("animated", animated, COLOUR, "the first picture")
    yield kind("without its last chunk", png(COLOUR, 8, 2)[:-12], None, "")


def tiffs() -> Iterator[Kind]:
    wide = GREY.astype(np.uint16) * 256 + 7
    high = "the upper 8 bits of each value"

    def kind(
        variant: str, data: bytes, pixels: Pixels | None = COLOUR, taken: str = "as stored"
    ) -> Kind:
        return Kind("TIFF", variant, data, pixels, taken)

    yield kind("colour", tiff(IMAGE))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield kind(compression.rpartition("_")[2], tiff(IMAGE, compression=compression))
    yield kind("grey", tiff(GREY_IMAGE), grey(GREY))
    bits = Image.fromarray(GREY > 127)
    yield kind("1 bit", tiff(bits, compression="group4"), grey((GREY > 127) * np.uint8(255)))
    yield kind("palette", tiff(IMAGE.quantize(256)), np.asarray(IMAGE.quantize(256).convert("RGB")))
    with_alpha = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    yield kind("alpha", tiff(with_alpha), COLOUR, "the colours, without the transparency")
    inks = "the colours of the inks, without a profile"
    yield Kind("TIFF", "CMYK", tiff(Image.fromarray(INKS, mode="CMYK")), from_inks(INKS), inks, 1)
    yield kind("grey of 16 bits", tiff(Image.fromarray(wide)), grey(GREY), high)
    for orientation in range(2, 9):
        data = tiff(IMAGE, tiffinfo={274: orientation})
        yield kind(
            f"orientation {orientation}", data, turned(COLOUR, orientation), "turned upright"
        )
    pages = tiff(IMAGE, save_all=True, append_images=[OTHER.copy()])
    yield kind("several pages", pages, COLOUR, "the first picture")
    yield kind("floating point", tiff(Image.fromarray(GREY / np.float32(255))), None)
    yield kind("32 bits", tiff(Image.fromarray(GREY.astype(np.int32))), None)
    yield kind("12 bits", patched(tiff(Image.fromarray(wide)), *_bits_per_sample(16, 12)), None)
    yield kind("Lab", tiff(Image.fromarray(COLOUR, mode="LAB")), None)


def _bits_per_sample(old: int, new: int) -> Sequence[bytes]:
    return [struct.pack("<HHII", 258, 3, 1, bits) for bits in (old, new)]


def others() -> Iterator[Kind]:
    alpha = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    drop, first = "the colours, without the transparency", "the first picture"
    lossless: dict[str, Any] = {"lossless": True, "exact": True}
    more: dict[str, Any] = {"save_all": True, "append_images": [OTHER.copy()]}
    yield Kind("WebP", "lossless", encoded(IMAGE, "WEBP", **lossless), COLOUR)
    yield Kind("WebP", "lossy", encoded(IMAGE, "WEBP", quality=100), COLOUR, tolerance=20)
    yield Kind("WebP", "alpha", encoded(alpha, "WEBP", **lossless), COLOUR, drop)
    yield Kind("WebP", "animated", encoded(IMAGE, "WEBP", **lossless, **more), COLOUR, first)
    exif = encoded(IMAGE, "WEBP", exif=rotated(6), **lossless)
    yield Kind("WebP", "EXIF orientation", exif, COLOUR, "as stored, not turned")
    avif = encoded(IMAGE, "AVIF", quality=100, subsampling="4:4:4")
    yield Kind("AVIF", "colour", avif, COLOUR, tolerance=LOSSY)
    avif = encoded(IMAGE, "AVIF", quality=100, subsampling="4:4:4", exif=rotated(6))
    yield Kind("AVIF", "orientation", avif, COLOUR, "as stored, not turned", LOSSY)
    yield Kind("JPEG 2000", "colour", encoded(IMAGE, "JPEG2000"), COLOUR)
    yield Kind("JPEG 2000", "alpha", encoded(alpha, "JPEG2000"), COLOUR, drop)
    wide = Image.fromarray(GREY.astype(np.uint16) * 256 + 7)
    high = "the upper 8 bits of each value"
    yield Kind("JPEG 2000", "grey of 16 bits", encoded(wide, "JPEG2000"), grey(GREY), high)
    indexed = IMAGE.quantize(256)
    shown = np.asarray(indexed.convert("RGB"))
    yield Kind("GIF", "one picture", encoded(indexed, "GIF"), shown)
    yield Kind("GIF", "a transparent colour", encoded(indexed, "GIF", transparency=3), shown, drop)
    moving = encoded(indexed, "GIF", save_all=True, append_images=[OTHER.quantize(256)])
    yield Kind("GIF", "animated", moving, shown, first)
    yield Kind("BMP", "colour", encoded(IMAGE, "BMP"), COLOUR)
    yield Kind("BMP", "palette", encoded(indexed, "BMP"), shown)
    bits = Image.fromarray(GREY > 127)
    yield Kind("BMP", "1 bit", encoded(bits, "BMP"), grey((GREY > 127) * np.uint8(255)))
    yield Kind("BMP", "16 bits, first line on top", bmp16(COLOUR), CUT, tolerance=1)
    yield Kind("BMP", "alpha", encoded(alpha, "BMP"), COLOUR, drop)
    size = f"{SIDE} {SIDE}"
    text = " ".join(map(str, COLOUR.reshape(-1).tolist()))
    yield Kind("PPM, PGM, PBM", "colour", encoded(IMAGE, "PPM"), COLOUR)
    yield Kind("PPM, PGM, PBM", "as text", f"P3\n{size}\n255\n{text}\n".encode(), COLOUR)
    yield Kind("PPM, PGM, PBM", "grey", encoded(GREY_IMAGE, "PPM"), grey(GREY))
    bits_data = encoded(bits, "PPM")
    yield Kind("PPM, PGM, PBM", "1 bit", bits_data, grey((GREY > 127) * np.uint8(255)))
    yield Kind("PPM, PGM, PBM", "grey of 16 bits", encoded(wide, "PPM"), grey(GREY), high)
    float_map = f"Pf\n{size}\n-1.0\n".encode() + (GREY / np.float32(255)).astype("<f4").tobytes()
    yield Kind("PPM, PGM, PBM", "floating point (PFM)", float_map, None)
    for name, format_ in (("ICO", "ICO"), ("TGA", "TGA"), ("PCX", "PCX"), ("EPS", "EPS")):
        yield Kind(name, "any", encoded(IMAGE, format_), None)


KINDS = (*jpegs(), *pngs(), *tiffs(), *others())
