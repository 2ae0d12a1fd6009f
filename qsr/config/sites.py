"""Files of the group cluster, which describe a site, may leave out what all sites share."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore

from qsr.config.places import group_files
from qsr.errors import ConfigError

_WHOLE = ("local", "slurm")
"""The files with all settings of a launcher."""


def site(name: str, folders: Sequence[Path]) -> str:
    """The name under which Hydra finds a chosen file of the group cluster with all its settings: a
    file without a list of `defaults` changes those of its launcher's file, which is slurm if it
    names none. Raises ConfigError if the file cannot be read."""
    paths = group_files(folders, "cluster").get(name, [])
    if name in _WHOLE or not paths:
        return name
    own = _read(paths[0])
    if "defaults" in own:
        return name
    base = own.get("launcher", "slurm")
    if base not in _WHOLE:
        raise ConfigError(f"{paths[0]}: launcher={base!r}: choose from: {', '.join(_WHOLE)}")
    whole = f"{name} on {base}".replace("/", " ")
    node = {"defaults": [base, "_self_", f"{name}@_here_"], "name": name}
    ConfigStore.instance().store(group="cluster", name=whole, node=node)
    return whole


def _read(path: Path) -> dict[str, object]:
    try:
        found = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings, as in 'partition: gpu'")
    return found
