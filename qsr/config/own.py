"""Parts of a run that the user wrote: from target=MODULE:NAME or target=FILE.py:NAME to the
function or class itself, and the hash of its source, which belongs to the run's settings.

A copy of the project that a submitted job runs has the user's files too, in a folder for each
target, and takes them from there.
"""

import contextlib
import hashlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from qsr.config.overrides import suggest
from qsr.config.places import OWN_COPIES, PACKAGE
from qsr.errors import ConfigError

_INSTALLED = ("site-packages", "dist-packages")


class _Source(NamedTuple):
    """The files of a target."""

    module: str | None
    """Dotted name; None for a file."""
    name: str
    """Of the function or class in it."""
    folder: Path
    files: tuple[str, ...]
    """Relative to `folder`: the file, or all Python files of its package. Of a package that is
    installed only the module's own, because packages have versions."""
    is_installed: bool


def source_hashes(setting: str, target: str) -> dict[str, str]:
    """The files of a target with 16 hex digits of the hash of each. `setting`: the group that has
    the target. Nothing is imported. Raises ConfigError."""
    with _blaming(setting, target):
        return _hashes(_find(target))


def copies(targets: Mapping[str, str]) -> dict[str, Path]:
    """The files that a copy of the project needs for these targets (by group), by their paths in
    it. Raises ConfigError."""
    found: dict[str, Path] = {}
    for setting, target in targets.items():
        with _blaming(setting, target):
            source = _find(target)
        if not source.is_installed:
            place = OWN_COPIES.relative_to(PACKAGE.parent) / _key(target)
            found |= {(place / name).as_posix(): source.folder / name for name in source.files}
    return found


def load_own(setting: str, target: str, hashes: Mapping[str, str]) -> Callable[..., Any]:
    """The function or class. Raises ConfigError if it cannot be imported, or if its files are not
    those of `hashes`."""
    with _blaming(setting, target):
        source = _find(target)
        now = _hashes(source)
        for name in sorted(now.keys() | hashes.keys()):
            if now.get(name) != hashes.get(name):
                raise ConfigError(f"{source.folder / name} is not as it was when the run was made")
        module = _import(source)
        found = getattr(module, source.name, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
        what = "has no" if found is None else "needs a function or class, not the value"
        names = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{source.files[0]} {what} {source.name}; {suggest(source.name, names)}")


def call_own(
    setting: str, target: str, function: Callable[..., Any], *values: Any, **arguments: Any
) -> Any:
    """What the user's function returns. Raises ConfigError if it raises."""
    with _blaming(setting, target):
        try:
            return function(*values, **arguments)
        except Exception as error:
            raise ConfigError(_reason(error)) from None


@contextlib.contextmanager
def _blaming(setting: str, target: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{setting}.target={target}: {error}") from None


def _find(target: str) -> _Source:
    module, colon, name = target.rpartition(":")
    if not colon or not module or not name.isidentifier():
        raise ConfigError("write MODULE:NAME or FILE.py:NAME, as in my_package.models:build")
    copy, first = OWN_COPIES / _key(target), None
    if module.endswith(".py"):
        path = copy / Path(module).name if copy.is_dir() else Path(module)
        if not path.is_file():
            raise ConfigError(f"there is no file {path.absolute()}")
        return _Source(None, name, path.absolute().parent, (path.name,), False)
    top, *inner = module.split(".")
    if copy.is_dir():
        first = PathFinder.find_spec(top, [str(copy)])
    else:
        _look_in_current_folder()
        with contextlib.suppress(ValueError, ImportError):  # of __main__, of an empty name
            first = importlib.util.find_spec(top)
    spec = first
    for count, part in enumerate(inner, 1):
        folders = spec.submodule_search_locations if spec else None
        dotted = ".".join([top, *inner[:count]])
        spec = PathFinder.find_spec(dotted, folders) if folders and part else None
    if first is None or spec is None:
        raise ConfigError(
            f"no module {module} here or among the installed packages; a file is written with its "
            f"ending, as in path/to/file.py:{name}"
        )
    return _source_of(module, name, first, spec)


def _source_of(module: str, name: str, first: ModuleSpec, spec: ModuleSpec) -> _Source:
    """`first` is the outermost package, or the module itself."""
    if spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(f"{module} has no file of its own")
    file = Path(spec.origin).absolute()
    if not first.submodule_search_locations:
        return _Source(module, name, file.parent, (file.name,), _is_installed(file))
    package = Path(next(iter(first.submodule_search_locations))).absolute()
    folder, installed = package.parent, _is_installed(package)
    files = [file] if installed else [file, *sorted(package.rglob("*.py"))]
    relative = (path.relative_to(folder).as_posix() for path in files)
    return _Source(module, name, folder, tuple(dict.fromkeys(relative)), installed)


def _is_installed(path: Path) -> bool:
    standard = Path(sysconfig.get_paths()["stdlib"])
    ours = path.is_relative_to(PACKAGE) or path.is_relative_to(standard)
    return ours or any(part in _INSTALLED for part in path.parts)


def _look_in_current_folder() -> None:
    """As `python -m` does, but last, so that no file there hides an installed package."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))


def _hashes(source: _Source) -> dict[str, str]:
    try:
        return {
            name: hashlib.sha256((source.folder / name).read_bytes()).hexdigest()[:16]
            for name in source.files
        }
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror})") from None


def _key(target: str) -> str:
    return hashlib.sha256(target.encode()).hexdigest()[:16]


def _import(source: _Source) -> ModuleType:
    try:
        if source.module is None:
            return _import_file(source.folder / source.files[0])
        folder = str(source.folder)
        if Path(folder).is_relative_to(OWN_COPIES) and folder not in sys.path:
            sys.path.insert(0, folder)
        return importlib.import_module(source.module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"it cannot be imported ({_reason(error)})") from None


def _import_file(path: Path) -> ModuleType:
    """Each content of a file is a module of its own."""
    content = hashlib.sha256(os.fsencode(path) + path.read_bytes()).hexdigest()[:16]
    name = f"{path.stem}_{content}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _reason(error: BaseException) -> str:
    """The error in one line, and the line of the code that raised it."""
    *_, last = traceback.extract_tb(error.__traceback__)
    where = (Path(last.filename).name, last.lineno)
    if isinstance(error, SyntaxError):
        where = (Path(error.filename or "").name, error.lineno)
    text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return f"{type(error).__name__}: {text}; {where[0]}, line {where[1]}"
