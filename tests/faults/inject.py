"""Faults, for real: a process that ends between two system calls, disks full or read-only, no
network, no permission."""

import contextlib
import ctypes
import functools
import itertools
import os
import platform
import resource
import shutil
import struct
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

Lost = Literal["nothing", "contents", "contents and names"]
"""What of the changes that were not synced a crash takes with it. A kill takes nothing; a power
failure may take any of it, whatever the order in which it was made."""

_CRASHED, _ENDED = 8, 9


@functools.cache
def _can_unshare(what: str) -> bool:
    probe = subprocess.run(["unshare", what, "true"], capture_output=True, check=False)
    return os.geteuid() == 0 and probe.returncode == 0


needs_mounts = pytest.mark.skipif(not _can_unshare("-m"), reason="private mounts need root")
needs_own_network = pytest.mark.skipif(
    not (_can_unshare("-n") and shutil.which("ip")), reason="a private network needs root and ip"
)


def _unshare(namespaces: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(namespaces):
        raise OSError(ctypes.get_errno(), "unshare")


def no_network_here() -> None:
    """Leave this process and its children nobody to reach but themselves."""
    _unshare(0x40000000)  # CLONE_NEWNET
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def mount_here(folder: Path, *options: str) -> None:
    """Mount something for this process and its children alone."""
    _unshare(0x00020000)  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", *options, str(folder)], check=True)


def small_disk_here(folder: Path, size: int) -> None:
    """Make the empty `folder` a disk of `size` bytes, for this process and its children alone."""
    folder.mkdir(parents=True, exist_ok=True)
    mount_here(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def give_up_privileges_here() -> None:
    """Let permissions hold for this process, if it is root's, as they do for other users."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def fill(folder: Path) -> Path:
    """Take all the room of a small disk; returns the file that has it."""
    path = folder / "somebody_elses"
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Let no file of this process grow above `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SYSTEM_CALLS = {
    "mmap": (9,),
    "flock": (73,),
    "fsync": (74,),
    "ftruncate": (77,),
    "rename": (82, 264, 316),
    "mkdir": (83, 258),
    "unlink": (84, 87, 263),
    "statfs": (137, 138),
    "fallocate": (285,),
}
"""Their numbers on x86-64."""
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of another machine")


def refuse_here(call: str, number: int) -> None:
    """From now on the kernel answers this system call of this process with an error, as a file
    system would that has no such operation. Of mmap: where it is to map a file."""
    load, equal, answer = 0x20, 0x15, 0x06
    calls = SYSTEM_CALLS[call]
    rules = [(load, 0, 0, 0)]
    rules += [(equal, len(calls) - at, 0, nr) for at, nr in enumerate(calls)]
    rules += [(answer, 0, 0, 0x7FFF0000)]
    if call == "mmap":  # its fifth argument is the file, -1 for none
        rules += [(load, 0, 0, 16 + 4 * 8), (equal, 0, 1, 0xFFFFFFFF), (answer, 0, 0, 0x7FFF0000)]
    rules += [(answer, 0, 0, 0x00050000 | number)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    about = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(program))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, about, 0, 0):  # no new privileges; a filter
        raise OSError(ctypes.get_errno(), "seccomp")


def in_a_child(action: Callable[[], object]) -> str:
    """What `action` returns as text, or the error that it raises, in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(action())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def crash_everywhere(action: Callable[[], Any], folder: Path, lost: Lost) -> Iterator[bool]:
    """Do `action`, which changes `folder`, again and again in a forked child that ends, without any
    clean-up, at the first, second, ... system call that changes the disk, and at last right after
    the action; yields after each crash whether it was the last. A write ends in its middle."""
    for number in itertools.count(1):
        child = os.fork()
        if child == 0:
            try:
                disk = _CrashingDisk(number, folder, lost)
                disk.install()
                action()
                disk.crash(_ENDED)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (_CRASHED, _ENDED), f"the action failed by itself, exit code {code}"
        yield code == _ENDED
        if code == _ENDED:
            return


class _Name(NamedTuple):
    """A change of a folder's names that was not synced: `new` came, in place of `old` if there was
    a renaming, over a file of these contents if there was one."""

    folder: int
    new: str
    old: str | None = None
    hidden: bytes | None = None


class _CrashingDisk:
    """Stands between this process and the disk, counts what changes it, and knows what the disk
    could still lose. Folders and files are known by their inodes, which renaming leaves alone."""

    def __init__(self, last: int, folder: Path, lost: Lost) -> None:
        self._left = last
        self._folder = folder
        self._lost = lost
        calls = [name.removeprefix("_on_") for name in dir(self) if name.startswith("_on_")]
        self._real = {name: getattr(os, name) for name in calls}
        self._contents: set[int] = set()
        self._names: list[_Name] = []

    def install(self) -> None:
        for name in self._real:
            setattr(os, name, functools.partial(self._call, name))

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            if name == "write":  # torn
                self._on_write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            self.crash(_CRASHED)
        return getattr(self, f"_on_{name}")(*arguments, **options)

    def crash(self, code: int) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)
        if self._lost != "nothing":
            for path in self._folder.rglob("*"):
                if path.stat().st_ino in self._contents:
                    os.truncate(path, 0)
        if self._lost == "contents and names":
            for change in reversed(self._names):
                self._undo(change)
        os._exit(code)

    def _undo(self, change: _Name) -> None:
        folders = (path for path in [self._folder, *self._folder.rglob("*")] if path.is_dir())
        folder = next((path for path in folders if path.stat().st_ino == change.folder), None)
        if folder is None or not (folder / change.new).exists():
            return  # removed since
        path = folder / change.new
        if change.old is not None:
            path.rename(folder / change.old)
            if change.hidden is not None:
                path.write_bytes(change.hidden)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def _on_open(self, path: Any, flags: int, *more: Any, **options: Any) -> int:
        new = flags & os.O_CREAT and not Path(path).exists()
        descriptor: int = self._real["open"](path, flags, *more, **options)
        if new:
            self._names.append(_Name(Path(path).parent.stat().st_ino, Path(path).name))
        return descriptor

    def _on_write(self, descriptor: int, data: Any) -> int:
        self._contents.add(os.fstat(descriptor).st_ino)
        return int(self._real["write"](descriptor, data))

    def _on_ftruncate(self, descriptor: int, size: int) -> None:
        self._contents.add(os.fstat(descriptor).st_ino)
        self._real["ftruncate"](descriptor, size)

    def _on_fsync(self, descriptor: int) -> None:
        self._real["fsync"](descriptor)
        inode = os.fstat(descriptor).st_ino
        self._contents.discard(inode)
        self._names = [change for change in self._names if change.folder != inode]

    def _on_mkdir(self, path: Any, *more: Any, **options: Any) -> None:
        self._real["mkdir"](path, *more, **options)
        self._names.append(_Name(Path(path).parent.stat().st_ino, Path(path).name))

    def _on_rename(self, old: Any, new: Any) -> None:
        self._real["rename"](old, new)
        folder = Path(new).parent.stat().st_ino
        self._names.append(_Name(folder, Path(new).name, Path(old).name))

    def _on_replace(self, old: Any, new: Any) -> None:
        hidden = Path(new).read_bytes() if Path(new).exists() else None
        self._real["replace"](old, new)
        folder = Path(new).parent.stat().st_ino
        self._names.append(_Name(folder, Path(new).name, Path(old).name, hidden))

    # a removal that is not synced is taken to have reached the disk: the worse case

    def _on_unlink(self, *arguments: Any, **options: Any) -> None:
        self._real["unlink"](*arguments, **options)

    def _on_rmdir(self, *arguments: Any, **options: Any) -> None:
        self._real["rmdir"](*arguments, **options)
