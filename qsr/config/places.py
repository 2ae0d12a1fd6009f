"""Where the files of settings are. Standard library only."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]

INSTALLED = (_PACKAGE / "configs").is_dir()
"""Whether this package was installed by pip, which puts the settings into it. Otherwise it is that
of a checkout, or of a copy of one, and they lie beside it."""

CONFIG_DIR = _PACKAGE / "configs" if INSTALLED else _PACKAGE.parent / "configs"
"""The folder of train.yaml, experiment/ and all other settings."""
