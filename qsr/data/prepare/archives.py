"""Safe extraction of tar archives: the complete archive or an error, and only into the folder."""

import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qsr.errors import DataError


def list_files(archive: Path) -> list[tarfile.TarInfo]:
    """All members of `archive`, in order. Reads only their headers.

    Raises:
        DataError: it cannot be read, is truncated, or has a member that is not a plain file.
    """
    with _open(archive, f"read {archive}") as tar:
        return list(_plain_files(tar))


def extract_files(archive: Path, members: Iterable[tarfile.TarInfo], folder: Path) -> None:
    """Extract `members`, as returned by `list_files(archive)`, into `folder`.

    Raises:
        DataError: a member cannot be read, or a file cannot be written.
    """
    with _open(archive, f"unpack {archive} into {folder}") as tar:
        tar.extractall(folder, members, filter="data")


def extract_inner_archive(archive: Path, member: tarfile.TarInfo, folder: Path) -> None:
    """Extract the tar that is `member` of `archive` into `folder`.

    It is read in place, without a temporary copy. Threads may call this concurrently.

    Raises:
        DataError: it cannot be read, is truncated, or has a member that is not a plain file; or a
            file cannot be written.
    """
    with _open(archive, f"unpack {archive} into {folder}") as tar:
        stream = tar.extractfile(member)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as inner:
                inner.extractall(folder, _plain_files(inner), filter="data")
        except tarfile.TarError as error:
            raise tarfile.ReadError(f"{member.name}: {error}") from error


def _plain_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    names = set()
    for member in tar:
        if not member.isreg() or "/" in member.name or member.name.startswith("."):
            raise tarfile.ReadError(f"member {member.name!r} is not a plain file at the top level")
        if member.name in names:
            raise tarfile.ReadError(f"member {member.name!r} appears twice")
        names.add(member.name)
        yield member
    # tarfile takes a damaged header, or truncation between two members, for the end
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"truncated or damaged after {len(names):,} members")


@contextmanager
def _open(archive: Path, doing: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise DataError(
            f"{archive} is damaged or not the expected file ({error}): download it again"
        ) from error
    except OSError as error:
        raise DataError(f"cannot {doing}: {error.strerror or error}") from error
