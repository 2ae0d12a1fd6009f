"""The labels of ImageNet's validation images: file name -> wnid, such as n01440764."""

import io
import re
import tarfile
import zlib
from pathlib import Path

from qsr.errors import DataError

WNID = re.compile(r"n\d{8}")
"""A WordNet ID, the name of a class."""

GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
SYNSETS = "data/meta.mat"


def read_devkit(archive: Path) -> dict[str, str]:
    """The labels in ILSVRC2012_devkit_t12.tar.gz.

    Line i of its ground truth is the ILSVRC2012_ID of ILSVRC2012_val_{i:08d}.JPEG; its meta.mat
    maps IDs to wnids (see the devkit's readme.txt). torchvision.datasets.imagenet reads the same
    files, but only from the archive with the known MD5.

    Raises:
        DataError: the archive or one of the two files in it cannot be read, or scipy is missing.
    """
    ground_truth, synsets = _read_members(archive, GROUND_TRUTH, SYNSETS)
    wnids = _wnids(archive, synsets)
    labels = {}
    for number, line in enumerate(ground_truth.decode("latin-1").splitlines(), start=1):
        try:
            wnid = wnids[int(line)]
        except (KeyError, ValueError):
            raise DataError(
                f"{archive}: line {number:,} of {GROUND_TRUTH} is {line!r}, not the ILSVRC2012_ID "
                "of a class: download it again"
            ) from None
        labels[f"ILSVRC2012_val_{number:08d}.JPEG"] = wnid
    return labels


def read_labels(path: Path) -> dict[str, str]:
    """The labels in a text file with lines `FILE WNID`.

    Raises:
        DataError: it cannot be read, or has an invalid line or the same file twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match line.split():
            case [file, wnid] if WNID.fullmatch(wnid) and file not in labels:
                labels[file] = wnid
            case _:
                raise DataError(
                    f"{path}: line {number:,} is {line!r}: write FILE WNID, each file once"
                )
    return labels


def _read_members(archive: Path, *endings: str) -> list[bytes]:
    """The contents of the members whose paths end with `endings`, in any folder."""
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                for ending in endings:
                    if member.isreg() and f"/{member.name}".endswith(f"/{ending}"):
                        stream = tar.extractfile(member)
                        assert stream is not None  # it is a regular file
                        found[ending] = stream.read()
    except FileNotFoundError as error:
        raise DataError(f"no file {archive}") from error
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{archive} is damaged or not the expected file: download it again"
        ) from error
    for ending in endings:
        if ending not in found:
            raise DataError(
                f"{archive} does not contain {ending}: it is not ILSVRC2012_devkit_t12.tar.gz"
            )
    return [found[ending] for ending in endings]


def _wnids(archive: Path, synsets: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid, from the contents of meta.mat."""
    try:
        from scipy.io import loadmat  # an optional dependency
    except ImportError as error:
        raise DataError(
            f"reading {SYNSETS} from the devkit needs scipy: pip install scipy"
        ) from error
    try:
        rows = loadmat(io.BytesIO(synsets), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as error:  # scipy raises many types on a broken file
        raise DataError(
            f"{archive}: cannot read {SYNSETS} ({type(error).__name__}: {error}): download it again"
        ) from error
