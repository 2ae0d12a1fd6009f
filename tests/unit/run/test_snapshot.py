"""Copies of the code: named by its contents, stored once, checked before they are used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qsr.run.snapshot import (
    EVERYTHING,
    ROOT,
    code_files,
    code_hash,
    git_revision,
    snapshot_folder,
    take_snapshot,
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package of two files, and what does not count."""
    for name in (
        "qsr/a.py", "qsr/core/b.py", "qsr/__pycache__/a.cpython.pyc", "qsr/core/.b.py.swp",
        "qsr/.cache/c.py", "scripts/train.py", "data/digits.png", "README.md",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return tmp_path


def test_caches_hidden_files_and_other_folders_are_left_out(project: Path) -> None:
    def names(*folders: str) -> list[str]:
        return [path.relative_to(project).as_posix() for path in code_files(project, folders)]

    assert names("qsr") == ["qsr/a.py", "qsr/core/b.py"]
    assert names(*EVERYTHING) == ["qsr/a.py", "qsr/core/b.py", "scripts/train.py"]


def test_the_hash_changes_with_contents_and_names_and_nothing_else(project: Path) -> None:
    before = code_hash(project)
    file = project / "qsr" / "a.py"
    text = file.read_text()
    (project / "qsr" / "__pycache__" / "b.cpython.pyc").write_text("new")
    (project / "scripts" / "train.py").write_text("new")
    os.utime(file, (1, 1))
    assert code_hash(project) == before
    file.write_text(text + "\n")
    edited = code_hash(project)
    file.write_text(text)
    assert code_hash(project) == before
    file.rename(project / "qsr" / "c.py")
    renamed = code_hash(project)
    assert len({before, edited, renamed}) == 3
    assert len(before) == 16


def test_where_a_file_ends_is_part_of_the_hash(tmp_path: Path) -> None:
    """One file that holds what two files hold together is other code."""
    (tmp_path / "one" / "qsr").mkdir(parents=True)
    (tmp_path / "two" / "qsr").mkdir(parents=True)
    (tmp_path / "two" / "qsr" / "a").write_text("1")
    (tmp_path / "two" / "qsr" / "b").write_text("2")
    (tmp_path / "one" / "qsr" / "a").write_text("1qsr/b\x002")
    assert code_hash(tmp_path / "one") != code_hash(tmp_path / "two")


def test_equal_code_is_stored_once_and_runs(tmp_path: Path) -> None:
    copy = take_snapshot(tmp_path)
    assert copy == snapshot_folder(tmp_path) == tmp_path / ".snapshots" / copy.name
    made = (copy / "qsr" / "run" / "snapshot.py").stat().st_ctime_ns
    assert take_snapshot(tmp_path) == copy
    assert [path.name for path in (tmp_path / ".snapshots").iterdir()] == [copy.name]
    assert (copy / "qsr" / "run" / "snapshot.py").stat().st_ctime_ns == made
    assert code_hash(copy, EVERYTHING) == code_hash(ROOT, EVERYTHING) == copy.name
    assert sorted(path.name for path in copy.iterdir()) == sorted([*EVERYTHING, "revision.json"])
    assert json.loads((copy / "revision.json").read_text()) == git_revision()
    ask = "import qsr.run.snapshot as s; print(s.ROOT, s.running_code(), s.git_revision())"
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ask], env=environment, capture_output=True, text=True,
        check=True, cwd=tmp_path,
    )  # fmt: skip
    # it is the copy that runs, and it knows the commit that it is of
    assert done.stdout.strip() == f"{copy} {code_hash(ROOT)} {git_revision()}"


def test_an_edited_or_damaged_copy_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is nobody's but the user's to remove, and jobs may run it."""
    copy = take_snapshot(tmp_path)
    file = copy / "qsr" / "cluster" / "slurm.py"
    assert file.stat().st_mode & 0o222 == 0  # an editor has to be told
    file.chmod(0o644)
    file.write_text(file.read_text() + "# quick fix\n")
    assert capsys.readouterr().err == ""
    second = take_snapshot(tmp_path)
    assert second.name == f"{copy.name}-2"
    assert capsys.readouterr().err == (
        f"warning: {copy} was edited or damaged; using {second.name} instead; remove the damaged "
        f"copy when no job uses it\n"
    )
    assert code_hash(second, EVERYTHING) == copy.name
    assert file.read_text().endswith("# quick fix\n")
    (second / "qsr" / "ops" / "jobs.py").unlink()  # what a power failure may leave
    third = take_snapshot(tmp_path)
    assert third == snapshot_folder(tmp_path) == copy.with_name(f"{copy.name}-3")
    assert take_snapshot(tmp_path) == third
