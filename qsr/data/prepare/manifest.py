"""The manifest of a checked data set, and the record from which a check resumes."""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from qsr.data.datasets import ImageFolder
from qsr.data.prepare.lock import lock


class SoundFile(NamedTuple):
    """A file that was decoded without error."""

    file: str
    """Path relative to the data root."""
    bytes: int
    mtime_ns: int
    """Modification time."""
    sha256: str


class CheckRecord:
    """The files found good so far, in a file that stays readable if the process is killed.

    Raises:
        DataError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+")
        lock(self._file, path.parent)
        self._known: dict[str, SoundFile] = {}
        self._file.seek(0)
        end = 0
        for line in self._file:
            found = _parse(line)
            if found is None:
                break  # a kill cut it short, or something else wrote it
            self._known[found.file] = found
            end += len(line)
        self._file.truncate(end)

    def find(self, file: str, status: os.stat_result) -> SoundFile | None:
        """The record of `file`, if its size and modification time still match."""
        known = self._known.get(file)
        if known is None or (known.bytes, known.mtime_ns) != (status.st_size, status.st_mtime_ns):
            return None
        return known

    def add(self, files: Iterable[SoundFile]) -> None:
        """Record files, except those that `find` returned."""
        for found in files:
            if self._known.get(found.file) is not found:
                self._file.write(json.dumps(found._asdict()) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Remove the record after a complete check."""
        self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _parse(line: str) -> SoundFile | None:
    """What `CheckRecord.add` wrote; None if it is something else."""
    try:
        found = SoundFile(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = SoundFile.__annotations__
    return found if all(type(v) is kinds[k] for k, v in found._asdict().items()) else None


class Manifest:
    """The contents of a data set. The same bytes always give the same manifest.

    manifest.csv has one line per file: path, bytes and SHA-256. manifest.json has the totals, the
    number of images per class, the fingerprints of file names as in a run's data.json, and the
    SHA-256 of manifest.csv: two copies of a data set are equal if their manifest.json files are.
    """

    def __init__(self, folder: Path, splits: Sequence[ImageFolder]) -> None:
        self._splits = splits
        self._bytes: Counter[str] = Counter()
        self._csv_path = folder / "manifest.csv"
        self._json_path = folder / "manifest.json"
        self._partial = folder / "manifest.csv.partial"
        # write file names exactly as on disk, even if they are not valid UTF-8
        self._file = self._partial.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._csv.writerow(("file", "bytes", "sha256"))

    def add(self, files: Iterable[SoundFile]) -> None:
        """Add files, in the order of the splits."""
        for found in files:
            self._csv.writerow((found.file, found.bytes, found.sha256))
            self._bytes[found.file.partition("/")[0]] += found.bytes

    def complete(self) -> None:
        """Move the manifest into place after all files have been added."""
        self._file.close()
        self._partial.replace(self._csv_path)
        counts = {split.split: Counter(split.labels) for split in self._splits}
        manifest = {
            **{f"{split.split}_images": len(split) for split in self._splits},
            **{f"{split.split}_bytes": self._bytes[split.split] for split in self._splits},
            **{f"{split.split}_files": split.fingerprint for split in self._splits},
            "manifest_csv_sha256": _sha256(self._csv_path),
            "classes": {
                name: {split: count[label] for split, count in counts.items()}
                for label, name in enumerate(self._splits[0].classes)
            },
        }
        partial = self._json_path.with_name("manifest.json.partial")
        partial.write_text(json.dumps(manifest, indent=2) + "\n")
        partial.replace(self._json_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
