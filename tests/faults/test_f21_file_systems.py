"""F21: file systems differ. Where one lacks an operation, there is a substitute that keeps every
promise on this page, or the run is refused before it starts, in one line with the folder and the
operation. The doctor says the same."""

import errno
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsr.config.load import load_config, run_folder
from qsr.errors import ConfigError
from qsr.ops.checks import check_folder
from qsr.run.checkpoint import room_for_checkpoints
from qsr.run.durable import partial_name, remove_folder, replace_file, reserve, sync_folder
from qsr.run.folder import RunFolder
from qsr.run.folder_trial import try_folder
from qsr.run.identity import make_run_folder
from qsr.run.lock import take
from tests.cli import ENVIRONMENT, RUN, command, folder_in, same_weights
from tests.faults.inject import in_a_child, mount_here, needs_mounts, needs_x86, refuse_here
from tests.faults.small import checkpointer, holds, save, steps_in
from tests.support import run_ranks


def use(folder: Path) -> str:
    """All that a run does with its files, small; returns what a trial says of the folder."""
    said = try_folder(folder)
    folder.mkdir(exist_ok=True)
    lock = take(folder)
    results = folder / "model.safetensors"
    reserve(results, 100_000)
    assert partial_name(results).stat().st_size == 100_000
    replace_file(results, [b"weights"])
    assert results.read_bytes() == b"weights"
    for step in (20, 25, 30):
        save(checkpointer(folder / "checkpoints"), step)
    session = checkpointer(folder / "checkpoints")
    room_for_checkpoints(folder / "checkpoints", 2, 1000, 1000)
    assert session.latest() == 30
    assert holds(session, 30)
    assert steps_in(folder / "checkpoints") == [25, 30]
    assert lock.locate() == str(folder)
    lock.release()
    return said or "nothing lacks"


@needs_x86
@pytest.mark.parametrize(
    ("call", "number", "said"),
    [
        ("fallocate", errno.EOPNOTSUPP, "nothing lacks"),
        ("fallocate", errno.EINVAL, "nothing lacks"),
        ("fallocate", errno.ENOSYS, "nothing lacks"),
        ("fallocate", errno.EPERM, "nothing lacks"),
        ("mmap", errno.ENODEV, "nothing lacks"),
        ("mmap", errno.EACCES, "nothing lacks"),
        ("mmap", errno.ENOSYS, "nothing lacks"),
        ("statfs", errno.ENOSYS, "nothing lacks"),
        ("statfs", errno.EACCES, "nothing lacks"),
        ("flock", errno.ENOLCK, "locks"),
        ("flock", errno.EOPNOTSUPP, "locks"),
        ("flock", errno.ENOSYS, "locks"),
    ],
)
def test_what_a_file_system_lacks_has_a_substitute(
    call: str, number: int, said: str, tmp_path: Path
) -> None:
    def without() -> str:
        refuse_here(call, number)
        return use(tmp_path / "run")

    assert in_a_child(without) == said
    assert use(tmp_path / "run") == "nothing lacks"  # and where it is there again


@needs_x86
@pytest.mark.parametrize(
    ("call", "number", "operation"),
    [
        ("mkdir", errno.EPERM, "making a folder"),
        ("fsync", errno.EINVAL, "writing and syncing a file"),
        ("fsync", errno.ENOSYS, "writing and syncing a file"),
        ("fsync", errno.EIO, "writing and syncing a file"),
        ("ftruncate", errno.ENOSYS, "replacing a file"),
        ("rename", errno.EPERM, "replacing a file"),
        ("rename", errno.EEXIST, "replacing a file"),
        ("rename", errno.ENOSYS, "replacing a file"),
        ("unlink", errno.EPERM, "removing a folder"),
        ("fallocate", errno.ENOSPC, "reserving disk space"),
        ("fallocate", errno.EDQUOT, "reserving disk space"),
    ],
)
def test_what_has_none_is_refused_at_the_start_and_by_the_doctor(
    call: str, number: int, operation: str, tmp_path: Path
) -> None:
    config = load_config([*RUN, f"data.root={tmp_path}", f"runs_dir={tmp_path}"])
    folder = run_folder(config)

    def begin() -> None:
        refuse_here(call, number)
        make_run_folder(RunFolder(folder))

    def ask_the_doctor() -> None:
        refuse_here(call, number)
        check_folder(config)

    for look in (begin, ask_the_doctor):
        message = in_a_child(look)
        start = f"{folder} cannot be written: choose another runs_dir ([Errno {number}] "
        assert message.startswith(f"ConfigError: {start}")
        assert message.endswith(f", while {operation})")
        assert "\n" not in message
        assert not folder.exists()
    make_run_folder(RunFolder(folder))


class NoSyncOfFolders:
    """Stands for os.fsync: answers `number` for folders."""

    def __init__(self, number: int) -> None:
        self._number, self._real = number, os.fsync

    def __call__(self, descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(self._number, os.strerror(self._number))
        self._real(descriptor)


@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EISDIR, errno.EACCES]
)
def test_folders_that_cannot_be_synced(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", NoSyncOfFolders(number))
    assert use(tmp_path / "run") == "nothing lacks"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_folder_whose_sync_fails_is_no_folder_without_sync(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", NoSyncOfFolders(number))
    with pytest.raises(OSError, match=f"Errno {number}"):
        sync_folder(tmp_path)
    with pytest.raises(ConfigError, match=f"Errno {number}.*, while replacing a file"):
        try_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EAGAIN, errno.EINTR])
@pytest.mark.parametrize("call", ["open", "rename", "replace"])
def test_an_error_that_passes_is_waited_for(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = getattr(os, call)
    failures = [True, False]

    def sometimes(*arguments: Any, **options: Any) -> Any:
        failures.append(failures.pop(0))
        if failures[-1] and os.fspath(tmp_path) in os.fspath(arguments[0]):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, sometimes)
    replace_file(tmp_path / "file", [b"new"])
    save(checkpointer(tmp_path / "checkpoints"), 5)
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert steps_in(tmp_path / "checkpoints") == [5]


@pytest.mark.parametrize("bytes_", [255, 256])
def test_a_name_that_is_too_long_is_told(bytes_: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / ("é" * 127 + "x" * (bytes_ - 254)) / "seed_1")
    if bytes_ == 255:
        make_run_folder(folder)
        assert use(folder.path) == "nothing lacks"
        return
    with pytest.raises(
        ConfigError, match=r"choose a shorter runs_dir, or change fewer settings .*too long"
    ):
        make_run_folder(folder)


def test_folders_are_listed_while_others_write(tmp_path: Path) -> None:
    """Files and folders come and go below."""
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            (tmp_path / "checkpoints" / "step" / "more").mkdir(parents=True)
            (tmp_path / "checkpoints" / "step" / "more" / "file").touch()
            shutil.rmtree(tmp_path / "checkpoints")

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(300):
            assert room_for_checkpoints(tmp_path / "checkpoints", 2, 1000, 0)[0] == 3000
    finally:
        done.set()
        other.join()


def use_ext3(rank: int, ranks: int, folder: Path) -> str:
    image = folder.with_name("image")
    with image.open("wb") as file:
        file.truncate(2**24)
    subprocess.run(["mkfs.ext3", "-q", "-F", str(image)], check=True)
    mount_here(folder, "-o", "loop", str(image))
    return use(folder / "run")


def use_tmpfs(rank: int, ranks: int, folder: Path) -> str:
    mount_here(folder, "-t", "tmpfs", "tmpfs")
    return use(folder / "run")


def use_an_overlay(rank: int, ranks: int, folder: Path) -> str:
    """Whose lower layer has the checkpoints of before, one of them damaged."""
    base = folder.with_name("base")
    mount_base = folder.with_name("layers")
    mount_base.mkdir()
    for step in (5, 30):
        save(checkpointer(base / "run" / "checkpoints"), step)
    (base / "run" / "checkpoints" / "step_000000030" / "state.json").write_text("damaged")
    mount_here(mount_base, "-t", "tmpfs", "tmpfs")  # an overlay cannot lie on every file system
    for name in ("upper", "work"):
        (mount_base / name).mkdir()
    layers = f"lowerdir={base},upperdir={mount_base}/upper,workdir={mount_base}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(folder)], check=True)
    return use(folder / "run")


@needs_mounts
@pytest.mark.parametrize("file_system", [use_ext3, use_tmpfs, use_an_overlay])
def test_a_real_one(file_system: Callable[..., str], tmp_path: Path) -> None:
    if file_system is use_ext3 and shutil.which("mkfs.ext3") is None:
        pytest.skip("no mkfs.ext3")
    (tmp_path / "disk").mkdir()
    (tmp_path / "base" / "run").mkdir(parents=True)
    assert run_ranks(file_system, 1, tmp_path / "disk") == ["nothing lacks"]


def test_what_an_overlay_cannot_rename_is_removed_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpointer(tmp_path / "checkpoints"), 5)

    def other_layer(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "rename", other_layer)
    remove_folder(tmp_path / "checkpoints" / "step_000000005")
    assert steps_in(tmp_path / "checkpoints") == []


POOR = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

int fsync(int descriptor) {
    struct stat found;
    if (fstat(descriptor, &found) == 0 && S_ISDIR(found.st_mode)) { errno = EINVAL; return -1; }
    return ((int (*)(int)) dlsym(RTLD_NEXT, "fsync"))(descriptor);
}
int flock(int descriptor, int operation) { errno = ENOLCK; return -1; }
int posix_fallocate(int descriptor, off_t start, off_t size) { return EINVAL; }
int posix_fallocate64(int descriptor, off64_t start, off64_t size) { return EINVAL; }
"""


@pytest.mark.slow
def test_a_run_where_much_is_lacking_comes_to_the_same_bits(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """No sync of folders, no locks, no fallocate, stopped once and gone on with."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    (tmp_path / "poor.c").write_text(POOR)
    library = tmp_path / "poor.so"
    build = ["gcc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "poor.c"), "-ldl"]
    subprocess.run(build, check=True)
    poor = ENVIRONMENT | {"LD_PRELOAD": str(library)}
    settings = command(digits, tmp_path / "runs", "checkpoint.every_steps=10")
    for more in (["stop_after_steps=15"], []):
        done = subprocess.run([*settings, *more], env=poor, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "cannot be locked ([Errno 37]" in done.stderr
    assert same_weights(folder_in(tmp_path / "runs"), uninterrupted)
