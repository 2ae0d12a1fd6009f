"""Where the files of settings are. Standard library only."""

import os
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
"""The folder of this package."""

INSTALLED = (PACKAGE / "configs").is_dir()
"""Whether this package was installed by pip, which puts the settings into it. Otherwise it is that
of a checkout, or of a copy of one, and they lie beside it."""

CONFIG_DIR = PACKAGE / "configs" if INSTALLED else PACKAGE.parent / "configs"
"""The folder of train.yaml, experiment/ and all other settings."""

OWN_COPIES = PACKAGE.parent / "qsr_own"
"""In a copy of the project that jobs run: the files that its users' runs need (config/own.py)."""

_OTHER = "simulation"
"""The folder of scripts/simulate.py in it, which has groups of its own."""


def user_folder() -> Path:
    """The user's own folder of settings, laid out as CONFIG_DIR; it need not exist."""
    home = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not home.is_absolute():  # as the XDG specification wants it
        home = Path(os.path.expanduser("~/.config"))  # noqa: PTH111  (Path's needs a home)
    return home / "qsr"


def own_folders() -> tuple[Path, ...]:
    """The user's own folder, if it is there."""
    return (user_folder(),) if user_folder().is_dir() else ()


def groups(folders: Sequence[Path]) -> list[str]:
    """The groups of settings in these folders, of which a file is chosen with GROUP=NAME."""
    names = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
    return sorted(names - {_OTHER})


def group_files(folders: Sequence[Path], group: str) -> dict[str, list[Path]]:
    """The files of a group by the names that choose them, in the order of the folders; the lists
    are longer than 1 where several of them have one."""
    found: dict[str, list[Path]] = {}
    for folder in (folder / group for folder in folders):
        for path in folder.rglob("*.yaml"):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return dict(sorted(found.items()))
