"""Copies of the code, named by its contents: what a submitted job runs, whatever is edited since.

Standard library only.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsr.output import warn

ROOT = Path(__file__).parents[2]
PACKAGE = ("qsr",)
"""What decides what a run computes, beside its settings."""
EVERYTHING = ("qsr", "scripts", "configs")
"""What a job needs of the project."""
_REVISION = "revision.json"
"""In a copy: the commit that it was taken from."""
_LEFT_SECONDS = 86_400
"""A copy that was begun so long ago is not going to be finished."""


def code_files(root: Path, folders: tuple[str, ...]) -> Iterator[Path]:
    """The files of these folders of `root`, sorted; no caches, nothing hidden."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            parts = path.relative_to(root).parts
            if path.is_file() and not any(p.startswith((".", "__pycache__")) for p in parts):
                yield path


def code_hash(root: Path, folders: tuple[str, ...] = PACKAGE) -> str:
    """16 hex digits that are equal for equal names and contents of the files."""
    digest = hashlib.sha256()
    for path in code_files(root, folders):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


@functools.cache
def running_code() -> str:
    """The hash of the package that this process runs, as it was when this was first called."""
    return code_hash(ROOT)


def snapshot_folder(runs_dir: Path) -> Path:
    """Where `take_snapshot` puts the code as it is now: below the contents' hash, and, where that
    copy is not whole, below the hash and a number."""
    name = code_hash(ROOT, EVERYTHING)
    first = (runs_dir / ".snapshots" / name).absolute()
    others = (first.with_name(f"{name}-{number}") for number in itertools.count(2))
    copies = itertools.chain([first], others)
    return next(path for path in copies if not path.exists() or _is_whole(path, name))


def _is_whole(copy: Path, name: str) -> bool:
    try:
        return code_hash(copy, EVERYTHING) == name
    except OSError:
        return False


def take_snapshot(runs_dir: Path) -> Path:
    """Copy the project's code to below `runs_dir`, unless it is there; return the copy's folder.

    Equal code is stored once. Nothing here removes or changes a copy, because jobs may run it: one
    that was edited or damaged is passed over, with a line on stderr. What a copying that was killed
    has left behind a day ago is removed. Raises OSError.
    """
    target = snapshot_folder(runs_dir)
    name = code_hash(ROOT, EVERYTHING)
    if target.name != name:
        warn(
            f"warning: {target.with_name(name)} was edited or damaged, and jobs may run it: "
            f"{target.name} is used instead; remove it when no job does"
        )
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    try:
        for path in code_files(ROOT, EVERYTHING):
            copy = partial / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            copy.chmod(0o444)
        (partial / _REVISION).write_text(json.dumps(git_revision()) + "\n")
        partial.chmod(0o755)
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.exists():  # it does if another process was first
            raise
    return target


def _remove_leftovers(folder: Path) -> None:
    """Of this user's own copying, which takes seconds."""
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            named = re.fullmatch(r"\.[0-9a-f]{16}\.\w{8}", path.name)
            if ours and named and time.time() - found.st_mtime > _LEFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def git_revision() -> dict[str, Any] | None:
    """The commit that this process's code is of, and whether the checkout was modified; of a
    snapshot, when it was taken. None if there was no checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    if (ROOT / _REVISION).exists():
        stored: dict[str, Any] | None = json.loads((ROOT / _REVISION).read_text())
        return stored
    try:
        return {
            "revision": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
