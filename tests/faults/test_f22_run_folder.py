"""F22: anything else happens to a run folder: it is moved or deleted, or holds links, foreign
files, files of other users or damaged records, or the power fails. The run continues, or ends with
one line that says why. Nothing outside the folder is written or removed, and only damaged rows of
its record are lost."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr import ConstantRule, ConstantSchedule, Plan, build
from qsr.config.load import load_config, run_folder
from qsr.errors import ConfigError, FolderMovedError, TrainingError
from qsr.run.checkpoint import Checkpointer
from qsr.run.durable import partial_name, replace_file, reserve
from qsr.run.environment import other_code
from qsr.run.folder import Row, RunFolder, read_rows
from qsr.run.identity import check_run_folder
from qsr.run.lock import take
from qsr.run.mirror import _wandb_id
from qsr.run.results import ModelFile, reserve_results, write_results
from qsr.run.tracking import JsonlTracker
from qsr.train.model_file import Description
from tests.cli import RUN, command, folder_in, same_weights, start, wait_for
from tests.faults.inject import (
    fill,
    give_up_privileges_here,
    needs_mounts,
    no_file_above,
    small_disk_here,
)
from tests.faults.small import PAIR, checkpointer, holds, rewrite_manifest, save, steps_in
from tests.support import Setup, run_ranks, train

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


# The folder is moved, or deleted


def session(folder: Path) -> Checkpointer:
    """One that has saved after step 5, and holds the folder's lock to the end of the test."""
    folder.mkdir()
    made = Checkpointer(folder / "checkpoints", 2, PAIR, take(folder).locate)
    save(made, 5)
    return made


def test_a_folder_that_was_moved_is_saved_to_where_it_is(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "run"
    saving = session(run)
    moved.parent.mkdir()
    run.rename(moved)
    with pytest.raises(FolderMovedError) as told:
        save(saving, 10)
    assert str(told.value) == (
        f"{run} was moved to {moved} during training; the checkpoint after step 10 was saved "
        f"there; move it back and run the same command to resume"
    )
    assert not run.exists()
    assert steps_in(moved / "checkpoints") == [5, 10]
    moved.rename(run)
    reader = checkpointer(run / "checkpoints")
    assert reader.latest() == 10
    assert holds(reader, 10)


def test_a_folder_that_was_moved_to_a_disk_that_is_full(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    saving = session(run)
    run.rename(moved)
    with no_file_above(100), pytest.raises(FolderMovedError, match="step 10 could not be written"):
        save(saving, 10)
    assert steps_in(moved / "checkpoints") == [5]


def delete(run: Path) -> None:
    shutil.rmtree(run)


def begin_another(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()
    take(run)


def lock_anew(run: Path) -> None:
    (run / "run.lock").unlink()
    take(run)


@pytest.mark.parametrize("happens", [delete, begin_another, lock_anew])
def test_a_folder_that_is_gone_is_not_made_again(
    happens: Callable[[Path], None], tmp_path: Path
) -> None:
    """Nor is that of another session touched."""
    run = tmp_path / "run"
    saving = session(run)
    happens(run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FolderMovedError, match=f"{run} was deleted or replaced during training, "):
        save(saving, 10)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_that_was_removed_is_no_reason_to_stop(tmp_path: Path) -> None:
    saving = session(tmp_path / "run")
    (tmp_path / "run" / "run.lock").unlink()
    save(saving, 10)
    assert steps_in(tmp_path / "run" / "checkpoints") == [5, 10]


@pytest.mark.slow
def test_a_run_whose_folder_is_moved_loses_no_step(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    runs = tmp_path / "runs"
    arguments = command(digits, runs, "checkpoint.every_steps=5", "tracking.log_every_steps=1")
    process = start(arguments, stderr=subprocess.PIPE)
    wait_for(runs, "step_000000005", process)
    os.killpg(process.pid, signal.SIGSTOP)
    run, moved = folder_in(runs), tmp_path / "moved"
    run.rename(moved)
    os.killpg(process.pid, signal.SIGCONT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = told.decode().splitlines()
    assert f"{run} was moved to {moved} during training; the checkpoint after step" in line
    assert not run.exists()
    newest = steps_in(moved / "checkpoints")[-1]
    rows = read_rows(moved / "metrics.jsonl")[0]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, newest + 1))
    moved.rename(run)
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert same_weights(run, uninterrupted)


# Strays in checkpoints/


def test_an_old_checkpoint_that_is_a_link_to_another_disk(tmp_path: Path) -> None:
    """It can be resumed from; when it is too old the link goes, and what it leads to stays."""
    folder, archive = tmp_path / "checkpoints", tmp_path / "archive"
    save(checkpointer(folder), 5)
    (folder / "step_000000005").rename(archive)
    (folder / "step_000000005").symlink_to(archive)
    content = {path.name: path.read_bytes() for path in archive.iterdir()}
    saving = checkpointer(folder)
    assert saving.latest() == 5
    for step in (10, 15, 20):
        save(saving, step)
    assert steps_in(folder) == [15, 20]
    assert {path.name: path.read_bytes() for path in archive.iterdir()} == content


def make_a_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "archive")


def make_a_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").touch()


KINDS = [Path.touch, os.mkfifo, make_a_link, make_a_folder]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("archive", [True, False])
def test_whatever_is_in_the_way_of_a_name_gives_way(
    make: Callable[[Path], None], archive: bool, tmp_path: Path
) -> None:
    """Where only a run writes: a checkpoint's own names. Links go, what they lead to stays."""
    if archive:
        make_a_folder(tmp_path / "archive")
    folder = tmp_path / "checkpoints"
    save(checkpointer(folder), 5)
    for name in ("step_000000010", "step_000000007.partial", "step_000000008.01ab23cd.partial"):
        make(folder / name)
    saving = checkpointer(folder)
    assert saving.latest() == 5
    for step in (10, 15):
        save(saving, step)
    assert steps_in(folder) == [10, 15]
    assert holds(saving, 10)
    assert (tmp_path / "archive" / "precious").exists() == archive


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["copy.partial", "step_5", "step_²", "step_٣", "notes", "step_"])
def test_what_somebody_else_has_put_there_stays(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    make(folder / name)
    for step in (5, 10, 15):
        saving = checkpointer(folder)
        saving.latest()
        save(saving, step)
    left = {path.name for path in folder.iterdir()}
    assert left == {name, "step_000000010", "step_000000015"}


@needs_root
def test_leftovers_that_cannot_be_removed_are_in_nobodys_way(tmp_path: Path) -> None:
    """They are another user's, whose folder is closed."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step_000000007.partial", "step_000000008"):
        make_a_folder(folder / name)
        os.chown(folder / name, NOBODY, NOBODY)
    assert run_ranks(save_without_privileges, 1, folder) == [[10, 15]]


def save_without_privileges(rank: int, ranks: int, folder: Path) -> list[int]:
    give_up_privileges_here()
    saving = checkpointer(folder)
    for step in (5, 10, 15):
        save(saving, step)
    return [step for step in (5, 8, 10, 15) if (folder / f"step_{step:09}").exists()]


# The record


def rows_of(number: int) -> list[Row]:
    return [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, number + 1)]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for row in rows_of(20):
        tracker.log(row)
    tracker.close()
    return path


def test_damage_costs_the_row_that_it_hits(record: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bit anywhere, a line's end too: the others are there, in their order, and so are the bytes
    of the one that cannot be read."""
    whole, draw = record.read_bytes(), random.Random(1)
    unreadable = 0
    for _ in range(120):
        place = draw.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        record.write_bytes(damaged)
        JsonlTracker(record).close()
        found = read_rows(record)[0]
        hit = whole[:place].count(b"\n")
        others = [row for at, row in enumerate(rows_of(20)) if at != hit]
        assert [row for row in found if row in others] == others
        assert len(found) in (19, 20)
        aside = list(record.parent.glob("metrics.jsonl.damaged-*"))
        assert len(aside) == (20 - len(found) if hit < 19 else len(aside))
        for path in aside:
            line = bytes(damaged).split(b"\n")[hit]
            assert path.read_bytes()[:10] in line or hit == 19
            path.unlink()
            unreadable += 1
    assert capfd.readouterr().err.count("that could not be read to metrics") == unreadable > 40


@pytest.mark.parametrize(
    "line",
    [b"5", b"[]", b'{"step": "x"}', b'{"kind": "train"}', b"\0" * 40, b"[" * 100_000, b"\xff"],
)
def test_a_line_that_is_no_row_is_put_aside(
    line: bytes, record: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, after = record.read_bytes().split(b"\n", 5)[:5], record.read_bytes().split(b"\n", 5)[5]
    record.write_bytes(b"\n".join([*before, line, after]))
    assert read_rows(record)[0] == rows_of(20)
    tracker = JsonlTracker(record)
    tracker.rewind(12)
    tracker.log({"kind": "train", "step": 13, "loss": 0.5})
    tracker.close()
    assert read_rows(record)[0] == [*rows_of(12), {"kind": "train", "step": 13, "loss": 0.5}]
    (aside,) = record.parent.glob("metrics.jsonl.damaged-*")
    assert aside.read_bytes() == line + b"\n"
    (told,) = capfd.readouterr().err.splitlines()
    assert told == f"{record}: moved 1 line that could not be read to {aside.name}"


def test_a_checkpoint_gets_its_name_when_the_rows_before_it_are_on_the_disk(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a power failure right after leaves the whole record."""
    settings = [
        *(*RUN, f"data.root={digits}", f"runs_dir={tmp_path}", "data.loader=torchvision"),
        *("cluster.ranks=1", "cluster.threads_per_rank=1", "tracking.log_every_steps=1"),
    ]
    folder = run_folder(load_config(settings))
    metrics = folder / "metrics.jsonl"
    synced, named = {}, []
    sync, rename = os.fsync, os.rename

    def remember(descriptor: int) -> None:
        sync(descriptor)
        about = os.fstat(descriptor)
        synced[about.st_ino] = about.st_size

    def look(old: Any, new: Any) -> None:
        if Path(new).name.startswith("step_") and not Path(new).name.endswith(".partial"):
            text = metrics.read_bytes()[: synced.get(metrics.stat().st_ino, 0)]
            named.append((int(Path(new).name.removeprefix("step_")), text.count(b"\n")))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "rename", look)
    build.run(load_config([*settings, "checkpoint.every_steps=3", "stop_after_steps=7"]))
    assert named == [(3, 3), (6, 6), (7, 7)]


# Links, and files of others

WRITTEN = (
    *("config.yaml", "data.json", "environment.json", "metrics.jsonl", "failure.json"),
    *("model.safetensors.partial", "summary.json.partial", "config.yaml.partial"),
    *("data.json.partial", "environment.json.partial", "metrics.jsonl.partial"),
)


@pytest.fixture
def settings(digits: Path, tmp_path: Path) -> list[str]:
    return [
        *(*RUN, f"data.root={digits}", f"runs_dir={tmp_path / 'runs'}", "data.loader=torchvision"),
        *("cluster.ranks=1", "cluster.threads_per_rank=1", "stop_after_steps=2"),
    ]


@pytest.mark.parametrize("lay", [os.symlink, os.link])
def test_nothing_is_written_through_a_link(
    lay: Callable[[Path, Path], None], settings: list[str], tmp_path: Path
) -> None:
    folder = run_folder(load_config(settings))
    folder.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in WRITTEN:
        if name not in ("config.yaml", "data.json"):  # are read, and refused
            lay(precious, folder / name)
    assert isinstance(build.run(load_config(settings)), build.Stopped)
    assert precious.read_text() == "precious"
    assert precious.stat().st_nlink == 1
    (folder / "run.lock").unlink()
    lay(precious, folder / "run.lock")
    with pytest.raises(ConfigError, match=r"run\.lock (is a symbolic link|has another hard link)"):
        build.run(load_config(settings))
    assert precious.read_text() == "precious"


def test_the_room_that_was_taken_is_written_in_place_and_what_is_not_ours_alone_is_not(
    tmp_path: Path,
) -> None:
    path, copy = tmp_path / "model.safetensors", tmp_path / "copy"
    reserve(path, 1000)
    taken = partial_name(path).stat().st_ino
    replace_file(path, [b"weights"])
    assert (path.stat().st_ino, path.read_bytes()) == (taken, b"weights")
    os.link(path, copy)  # as `cp -al` keeps a run
    path.rename(partial_name(path))
    replace_file(path, [b"other weights"])
    assert (copy.read_bytes(), path.read_bytes()) == (b"weights", b"other weights")


@needs_root
@pytest.mark.parametrize("what", ["checkpoints", "seed_3", "quadratic"])
def test_a_link_to_a_folder_is_followed_if_it_is_the_users_own(
    what: str, settings: list[str], tmp_path: Path
) -> None:
    config = load_config(settings)
    folder = RunFolder(run_folder(config))
    below = (folder.checkpoints, *folder.checkpoints.parents)
    place = next((path for path in below if path.name == what), below[2])
    place.parent.mkdir(parents=True)
    (tmp_path / "other_disk").mkdir()
    place.symlink_to(tmp_path / "other_disk")
    assert isinstance(build.run(config), build.Stopped)
    assert list((tmp_path / "other_disk").iterdir())
    os.chown(place, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(ConfigError, match=f"{place} is a symbolic link owned by another user"):
        build.prepare(config)


def go_on_without_privileges(rank: int, ranks: int, settings: list[str]) -> str:
    give_up_privileges_here()
    try:
        build.run(load_config(settings))
    except ConfigError as error:
        return str(error)
    return "went on"


@needs_root
@pytest.mark.parametrize(
    ("name", "mode", "told"),
    [
        ("run.lock", 0o644, "run.lock cannot be opened for writing (Permission denied): ask its"),
        ("run.lock", 0o600, "run.lock cannot be read (Permission denied): ask its owner for acc"),
        ("metrics.jsonl", 0o600, "metrics.jsonl cannot be read (Permission denied): ask its owner"),
        ("metrics.jsonl", 0o644, "went on"),
    ],
)
def test_the_folder_of_another_user(name: str, mode: int, told: str, settings: list[str]) -> None:
    """Of a group, whose folders all may write to."""
    build.run(load_config(settings))
    folder = run_folder(load_config(settings))
    for path in (folder, folder / "checkpoints"):
        path.chmod(0o777)
    os.chown(folder / name, NOBODY, NOBODY)
    (folder / name).chmod(mode)
    (answer,) = run_ranks(go_on_without_privileges, 1, [*settings, "stop_after_steps=3"])
    assert told in answer
    assert "\n" not in answer


@pytest.mark.parametrize("before", [None, "", " \n", "../x", "a b", "\0", "kept-1_x"])
def test_the_name_at_wandb_is_always_one(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "wandb_id"
    if before is not None:
        path.write_text(before)
    name = _wandb_id(path)
    assert name == "kept-1_x" if before == "kept-1_x" else len(name) == 16
    assert _wandb_id(path) == path.read_text() == name


def test_the_name_at_wandb_where_it_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "wandb_id").mkdir()
    assert len(_wandb_id(tmp_path / "wandb_id")) == 16


ABOUT = Description(
    *("small_resnet", None, False, ("a", "b"), 32, 0.9, (0.5,) * 3, (0.2,) * 3, "fp32", "x", 1),
    *(5, 0.0, None),
)


def write_a_long_summary_on_a_full_disk(rank: int, ranks: int, path: Path) -> str:
    small_disk_here(path, 3_000_000)
    folder, model = RunFolder(path), {"weight": torch.ones(1000)}
    reserve_results(folder, model, ABOUT.metadata())
    fill(path)
    summary = {"text": "x" * 500_000}
    folder.model.with_name("somebody_elses").open("ab").close()
    real = os.replace

    def fill_and_replace(old: Any, new: Any) -> None:
        """Whatever the model file gives up is somebody else's at once."""
        fill(path)
        real(old, new)

    os.replace = fill_and_replace  # type: ignore[assignment]
    write_results(folder, ModelFile(model, ABOUT.metadata()), summary, {})
    return str(json.loads(folder.summary.read_text()) == summary)


@needs_mounts
def test_the_summary_has_room_of_its_own(tmp_path: Path) -> None:
    assert run_ranks(write_a_long_summary_on_a_full_disk, 1, tmp_path / "disk") == ["True"]


# Files of another shape


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of a run that has come to its end."""
    runs = tmp_path_factory.mktemp("finished")
    settings = [
        *(*RUN, f"data.root={digits}", f"runs_dir={runs}", "data.loader=torchvision"),
        *("cluster.ranks=1", "cluster.threads_per_rank=1"),
    ]
    build.run(load_config(settings))
    return settings


TEXTS = ["", "5", "[]", "{}", "{", "[" * 100_000, '{"code": [1]}']


@pytest.mark.parametrize("text", [*TEXTS, None], ids=range(len(TEXTS) + 1))
@pytest.mark.parametrize(
    "name", ["summary.json", "data.json", "config.yaml", "environment.json", "failure.json"]
)
def test_a_file_of_another_shape_is_told_in_one_line_or_does_not_matter(
    name: str, text: str | None, finished: list[str], tmp_path: Path
) -> None:
    config = load_config([*finished, f"runs_dir={tmp_path}"])
    folder = RunFolder(run_folder(config))
    shutil.copytree(run_folder(load_config(finished)), folder.path)
    path = folder.path / name
    path.unlink(missing_ok=True)
    path.mkdir() if text is None else path.write_text(text)
    if name not in ("summary.json", "config.yaml"):
        folder.summary.unlink()
    try:
        check_run_folder(
            config, json.loads((folder.data).read_text()) if name != "data.json" else {}
        )
        folder.summary_if_finished()
        other_code(folder)
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
    if text is None or name == "summary.json" or name == "config.yaml":
        assert message.startswith(f"{path} ")
        assert len(message) < 600
    elif name != "data.json":
        assert message == ""


@pytest.mark.parametrize("text", ["[" * 100_000, "5", '{"sha256": 1}', '{"sha256": 1, "files": 5}'])
def test_a_manifest_of_another_shape_is_passed_over(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (5, 10):
        save(checkpointer(folder), step)
    (folder / "step_000000010" / "manifest.json").write_text(text)
    assert checkpointer(folder).latest() == 5


def test_a_manifest_of_a_million_million_workers_is_no_long_list(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (5, 10):
        save(checkpointer(folder), step)
    manifest = folder / "step_000000010" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"workers": 2', f'"workers": {10**12}'))
    rewrite_manifest(folder / "step_000000010")
    assert checkpointer(folder).latest() == 5


def test_a_state_of_another_program_is_told_in_one_line(tmp_path: Path) -> None:
    setup = Setup(Plan(ConstantSchedule(0.1, 12), ConstantRule(4)), folder=tmp_path, stop_after=6)
    train(setup)
    checkpoint = tmp_path / "checkpoints" / "step_000000006"
    (checkpoint / "state.json").write_text('{"file": "step_000000006/state.json", "workers": 2}')
    rewrite_manifest(checkpoint)
    with pytest.raises(TrainingError, match="after step 6 has no config_hash: another"):
        train(setup)
