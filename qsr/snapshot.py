"""Copies of the code, named by its contents: what a submitted job runs, whatever is edited since.

Standard library only.
"""

import functools
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ("qsr",)
"""What decides what a run computes, beside its settings."""
EVERYTHING = ("qsr", "scripts", "configs")
"""What a job needs of the project."""
_REVISION = "revision.json"
"""In a copy: the commit that it was taken from."""


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
    """Where `take_snapshot` puts the code as it is now."""
    return (runs_dir / ".snapshots" / code_hash(ROOT, EVERYTHING)).absolute()


def take_snapshot(runs_dir: Path) -> Path:
    """Copy the project's code to below `runs_dir`, unless it is there; return the copy's folder.

    Equal code is stored once, and nothing here removes it. Raises OSError, also if what is there
    is no longer what its name says.
    """
    target = snapshot_folder(runs_dir)
    if target.exists():
        if code_hash(target, EVERYTHING) != target.name:
            raise OSError(f"{target} was edited, and jobs may run it: remove it when none does")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
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
