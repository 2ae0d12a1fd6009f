"""Copies of the code, named by a hash of their contents. A submitted job runs such a copy, so that
later edits do not affect it. Standard library only.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qsr.config.places import INSTALLED, OWN_COPIES
from qsr.output import warn

Files = Mapping[str, Path]
"""Files by their paths in a copy."""
_NOTHING: Files = {}

ROOT = Path(__file__).parents[2]
PACKAGE = ("qsr",)
"""The code that, besides the settings, determines what a run computes."""
EVERYTHING = ("qsr", "qsr/configs") if INSTALLED else ("qsr", "scripts", "configs")
"""The folders of the project that a job needs."""
_REVISION = "revision.json"
"""File in a copy that holds the commit it was taken from."""
_LEFT_SECONDS = 86_400
"""An unfinished copy older than this is considered abandoned."""


def code_files(root: Path, folders: tuple[str, ...]) -> Iterator[Path]:
    """The files of these folders of `root`, sorted, without caches and hidden files. Those of
    "qsr/configs", which an installed package has, are none of "qsr"."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            parts = path.relative_to(root).parts
            settings = folder == "qsr" and parts[1] == "configs"
            hidden = any(part.startswith((".", "__pycache__")) for part in parts)
            if path.is_file() and not settings and not hidden:
                yield path


def code_hash(root: Path, folders: tuple[str, ...] = PACKAGE) -> str:
    """16 hex digits of a hash of the files' names and contents."""
    return _hash(_named(root, folders))


def _named(root: Path, folders: tuple[str, ...]) -> dict[str, Path]:
    return {path.relative_to(root).as_posix(): path for path in code_files(root, folders)}


def _hash(files: Files) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _all_files(own: Files) -> Files:
    """The project's files and those of its user, by their paths in a copy, in the order in which
    `code_files` finds them there."""
    return _named(ROOT, EVERYTHING) | dict(sorted(own.items(), key=lambda item: Path(item[0])))


@functools.cache
def running_code() -> str:
    """The code hash of the running package, computed at the first call."""
    return code_hash(ROOT)


def snapshot_folder(runs_dir: Path, own: Files = _NOTHING) -> Path:
    """Where `take_snapshot` puts the current code: a folder named by the hash of its contents, with
    a number appended if a copy with that name was edited or damaged."""
    name = _hash(_all_files(own))
    first = (runs_dir / ".snapshots" / name).absolute()
    others = (first.with_name(f"{name}-{number}") for number in itertools.count(2))
    copies = itertools.chain([first], others)
    return next(path for path in copies if not path.exists() or _is_whole(path, name))


def _is_whole(copy: Path, name: str) -> bool:
    try:
        return code_hash(copy, (*EVERYTHING, OWN_COPIES.name)) == name
    except OSError:
        return False


def take_snapshot(runs_dir: Path, own: Files = _NOTHING) -> Path:
    """Copy the project's code, and the user's `own` files (of config/own.py), to a folder below
    `runs_dir`, if no copy exists, and return that folder.

    Identical code is stored once. Copies are never removed or changed, because jobs may be running
    them: an edited or damaged copy is skipped, with a warning on stderr. Partial copies older than
    a day are removed. Raises OSError.
    """
    files = _all_files(own)
    target, name = snapshot_folder(runs_dir, own), _hash(files)
    if target.name != name:
        warn(
            f"warning: {target.with_name(name)} was edited or damaged; using {target.name} "
            f"instead; remove the damaged copy when no job uses it"
        )
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    try:
        for place, path in files.items():
            copy = partial / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            copy.chmod(0o444)
        (partial / _REVISION).write_text(json.dumps(git_revision()) + "\n")
        partial.chmod(0o755)
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.exists():  # otherwise another process was faster
            raise
    return target


def _remove_leftovers(folder: Path) -> None:
    """Remove this user's abandoned partial copies; copying takes seconds."""
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            named = re.fullmatch(r"\.[0-9a-f]{16}\.\w{8}", path.name)
            if ours and named and time.time() - found.st_mtime > _LEFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def git_revision() -> dict[str, Any] | None:
    """The commit of the running code and whether the checkout is modified; for a snapshot, as of
    when it was taken. None if the code is not in a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    if (ROOT / _REVISION).exists():
        stored: dict[str, Any] | None = json.loads((ROOT / _REVISION).read_text())
        return stored
    if INSTALLED:  # a checkout around it is another project's
        return None
    try:
        return {
            "revision": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
