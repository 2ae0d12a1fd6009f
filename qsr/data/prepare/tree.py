"""A data set's folder that is there completely or not at all."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def build_tree(root: Path, write: Callable[[Path], None], check: Callable[[Path], object]) -> None:
    """Let `write` fill a folder next to `root`, which is renamed to `root` at the end.

    If `root` exists, only `check` is called, which raises DataError if it is something else.
    """
    if root.exists():
        check(root)
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        write(scratch)
        scratch.chmod(0o755)  # mkdtemp creates it with mode 700
        scratch.rename(root)
    except OSError:
        if not root.exists():
            raise
        check(root)  # another process was faster
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
