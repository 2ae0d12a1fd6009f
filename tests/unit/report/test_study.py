"""Run folders written by hand -> groups of runs that differ in nothing but their seeds."""

import json
import shutil
from pathlib import Path

import pytest

from qsr.errors import ReportError
from qsr.report.study import Study, labelled_runs, read_study
from qsr.report.study_sheets import summary_lines
from tests.unit.report.conftest import WriteRun

CONSTANT = "experiment=demo/constant"
QUADRATIC = "experiment=demo/quadratic"
QSR = "QSR, H_base = 4, alpha = 0.4375"


def seeds(study: Study) -> dict[str, list[int]]:
    return {group.label: group.seeds for group in study.groups}


def test_runs_are_grouped_by_all_in_which_they_differ(tmp_path: Path, write_run: WriteRun) -> None:
    for seed in (10, 2, 1):
        write_run(QUADRATIC, f"seed={seed}")
    write_run(CONSTANT, "seed=2")
    write_run(CONSTANT, "seed=2", "schedule.peak_lr=0.1")
    study = read_study([tmp_path])
    assert seeds(study) == {
        "constant H = 4, schedule.peak_lr=0.1": [2],
        "constant H = 4, schedule.peak_lr=0.2": [2],
        f"{QSR}, schedule.peak_lr=0.2": [1, 2, 10],
    }
    assert study.by == ["schedule.peak_lr", "sync.alpha", "sync.h", "sync.h_base", "sync.rule"]
    assert (study.also, study.left_out, study.others) == ([], [], [])
    assert summary_lines(study) == ["5 finished runs in 3 groups, by schedule.peak_lr, sync"]


def test_groups_of_a_sweep_are_in_order_of_its_numbers(tmp_path: Path, write_run: WriteRun) -> None:
    for lr in ("0.4", "0.05", "1e-3"):
        write_run(CONSTANT, f"schedule.peak_lr={lr}")
    assert list(seeds(read_study([tmp_path]))) == [
        f"schedule.peak_lr={lr}" for lr in ("0.001", "0.05", "0.4")
    ]
    for alpha in ("0.1", "0.5", "0.25"):
        write_run(QUADRATIC, f"sync.alpha={alpha}")
    sweep = read_study(sorted(tmp_path.glob("runs/demo/quadratic/*")))
    assert list(seeds(sweep)) == [f"QSR, H_base = 4, alpha = {a}" for a in ("0.1", "0.25", "0.5")]


def test_a_label_has_only_what_it_needs(tmp_path: Path, write_run: WriteRun) -> None:
    """A network and its batch change together: the network names the group."""
    write_run(CONSTANT)
    write_run(CONSTANT, "model=small_vit", "global_batch=128")
    study = read_study([tmp_path])
    assert list(seeds(study)) == ["model.name=small_resnet", "model.name=small_vit"]
    assert {"global_batch", "model.name"} <= set(study.by)


def test_each_run_has_a_label_of_its_own(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(CONSTANT, "seed=2")
    write_run(QUADRATIC, "seed=2")
    assert list(labelled_runs(read_study([tmp_path]))) == ["constant H = 4", QSR]
    write_run(QUADRATIC, "seed=1")
    labelled = labelled_runs(read_study([tmp_path]))
    assert list(labelled) == ["constant H = 4, seed 2", f"{QSR}, seed 1", f"{QSR}, seed 2"]
    assert [run.config.seed for run in labelled.values()] == [2, 1, 2]


def test_unfinished_and_unreadable_runs_are_named_and_left_out(
    tmp_path: Path, three_seeds: list[Path]
) -> None:
    unfinished, damaged, whole = three_seeds
    (unfinished / "summary.json").unlink()
    (damaged / "summary.json").write_text("{")
    study = read_study([tmp_path])
    assert [run.folder for run in study.runs] == [whole]
    first, second = sorted(study.left_out, key=len)
    assert first == f"{unfinished} has not finished"
    assert second.startswith(f"{damaged}/summary.json cannot be read (")
    assert summary_lines(study) == [
        "1 finished run in 1 group",
        *(f"left out: {line}" for line in study.left_out),
    ]
    (whole / "summary.json").write_text('{"top1": 99.0}')
    with pytest.raises(ReportError, match=f"no finished run in {tmp_path}: .*has no train_images"):
        read_study([tmp_path])


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=f"^no runs in {tmp_path}: name run folders, or folders"):
        read_study([tmp_path])


def test_a_group_that_would_mix_runs_is_refused(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(QUADRATIC)
    one = write_run(CONSTANT)
    other = write_run(CONSTANT, "epochs=20", "seed=2")
    with pytest.raises(ReportError) as refused:
        read_study([tmp_path], by=["sync.rule"])
    assert str(refused.value) == (
        f"runs with sync.rule=constant differ in more than the seed: epochs (15, 20), as {one} and "
        f"{other} do; group by these too, --by sync,epochs, or name fewer runs"
    )
    assert seeds(read_study([tmp_path], by=["sync", "epochs"])) == {
        "constant H = 4, epochs=15": [1],
        "constant H = 4, epochs=20": [2],
        f"{QSR}, epochs=15": [1],
    }


def test_what_differs_beside_the_question_is_named(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(CONSTANT)
    write_run(QUADRATIC, "schedule.peak_lr=0.1")
    study = read_study([tmp_path], by=["sync.rule"])
    assert (study.by, study.also) == (["sync.rule"], ["schedule.peak_lr"])
    assert summary_lines(study) == [
        "2 finished runs in 2 groups, by sync",
        "the groups also differ in schedule.peak_lr (0.2, 0.1)",
    ]


def test_other_data_make_another_group(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(CONSTANT)
    for seed, files in ((2, "aaaa"), (3, None)):
        facts = {"train_images": 1442} | ({} if files is None else {"train_files": files})
        folder = write_run(CONSTANT, f"seed={seed}")
        (folder / "data.json").write_text(json.dumps(facts))
    older = tmp_path / "runs/demo/constant/seed_3"
    study = read_study([tmp_path])
    assert study.by == ["data.json.train_files"]
    # what an older run did not record cannot be said to be the same
    assert sorted(group.seeds for group in study.groups) == [[1], [2], [3]]
    shutil.rmtree(tmp_path / "runs/demo/constant/seed_2")
    assert read_study([tmp_path]).by == []  # and it is no difference by itself
    assert seeds(read_study([older])) == {"constant H = 4": [3]}


def test_a_run_counts_once(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(CONSTANT)
    (tmp_path / "link").symlink_to(folder)
    assert len(read_study([tmp_path, folder, tmp_path / "link"]).runs) == 1
    (tmp_path / "link").unlink()
    copy = shutil.copytree(folder, tmp_path / "copy")
    study = read_study([tmp_path])
    assert study.left_out == [f"{folder} is the same run as {copy}"]
    assert [run.folder for run in study.runs].count(copy) == 1
    assert folder not in [run.folder for run in study.runs]


@pytest.mark.parametrize("to", [QSR, "sync.rule=quadratic", "sync.alpha=4.375e-1,sync.h_base=4"])
def test_the_group_to_compare_with_is_found(tmp_path: Path, write_run: WriteRun, to: str) -> None:
    write_run(CONSTANT)
    write_run(QUADRATIC)
    study = read_study([tmp_path], to=to)
    assert study.reference is not None
    assert study.reference.label == QSR
    assert [group.label for group in study.others] == ["constant H = 4"]


@pytest.mark.parametrize(
    ("to", "why"),
    [
        ("nothing", "names no group: choose from constant H = 4; "),
        ("sync.rule=swap", "names no group: choose from constant H = 4; "),
        ("epochs=15", "names several groups: choose from constant H = 4; "),
    ],
)
def test_a_group_that_is_not_there_is_refused(
    tmp_path: Path, write_run: WriteRun, to: str, why: str
) -> None:
    write_run(CONSTANT)
    write_run(QUADRATIC)
    with pytest.raises(ReportError) as refused:
        read_study([tmp_path], to=to)
    assert str(refused.value) == f"--to {to!r} {why}{QSR}"


@pytest.mark.parametrize(
    ("by", "why"),
    [
        ("seed", "--by seed: the runs of a group are its seeds; leave it out"),
        ("data.root", "--by data.root: it does not change what a run computes; leave it out"),
        ("sync.rul", "--by sync.rul is not a setting of these runs; did you mean sync.rule?"),
    ],
)
def test_no_setting_to_group_by(tmp_path: Path, write_run: WriteRun, by: str, why: str) -> None:
    write_run(CONSTANT)
    write_run(QUADRATIC)
    with pytest.raises(ReportError) as refused:
        read_study([tmp_path], by=[by])
    assert str(refused.value) == why
