"""scripts/doctor.py as a user gives it: each thing that can be wrong is named, with its mend."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qsr import build
from qsr.config.load import load_config, run_folder
from qsr.ops import loading
from qsr.run.lock import take
from tests.cli import ROOT, RUN, TORCHRUN, call, call_here
from tests.faults.inject import mount_here, needs_mounts, small_disk_here
from tests.image_trees import textured_image
from tests.support import run_ranks

DOCTOR = [sys.executable, str(ROOT / "scripts" / "doctor.py")]
CHECKS = [
    *("device", "data", "network", "plan", "run folder", "free space", "decoding", "training"),
    *("loading", "tensorboard", "wandb", "ranks"),
]


@pytest.fixture(autouse=True)
def _shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "TRIAL_SECONDS", 0.1)


def settings(digits: Path, runs: Path, *more: str) -> list[str]:
    return [*RUN, f"data.root={digits}", f"runs_dir={runs}", *more]


def lines(output: str) -> list[tuple[str, str, str]]:
    """Verdict, name and text of each check."""
    return [(line[:4].strip(), line[6:17].strip(), line[19:]) for line in output.splitlines()]


def ask(arguments: list[str]) -> tuple[int, str]:
    """The exit status of the script and what it prints, in this process."""
    done = call_here("doctor", *arguments)
    return done.returncode, done.stdout


def failures(answer: tuple[int, str]) -> dict[str, str]:
    """The text of each check that failed, by name."""
    status, output = answer
    found = {name: text for verdict, name, text in lines(output) if verdict == "FAIL"}
    assert (status, len(found) > 0) == (1, True), output
    return found


def test_all_is_well(digits: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = call([*DOCTOR, *settings(digits, runs)])
    assert (done.returncode, done.stderr) == (0, "")
    found = lines(done.stdout)
    assert [name for _, name, _ in found] == CHECKS
    # which of loader and step is faster depends on the machine and on what else it does
    assert {verdict for verdict, name, _ in found if name != "loading"} == {"ok"}
    texts = {name: text for _, name, text in found}
    assert texts["data"] == "1,442 and 355 images of 10 classes"
    assert texts["network"] == "small_resnet accepts micro-batches of 32 images, 32 x 32"
    assert texts["training"] == "forward and backward pass of 32 images in fp32"
    faster = r"the loader gives [\d,]+ images/s, the step takes [\d,]+$"
    slower = rf"rank \d on \S+: {faster[:-1]}: training will wait for data \d+ % of the time, "
    expected = {"ok": faster, "slow": slower}[found[CHECKS.index("loading")][0]]
    assert re.match(expected, texts["loading"])
    assert texts["plan"].startswith("44 steps in 2 epochs, 9 rounds (volume 20.5 %)")
    assert texts["run folder"] == str(run_folder(load_config(settings(digits, runs))))
    assert texts["free space"].startswith("5.37 MB needed (2 + 1 checkpoints of 1.33 MB and the")
    assert texts["tensorboard"] == texts["wandb"] == "off"
    assert texts["ranks"] == "2 ranks, all-reduce with gloo"
    assert list(runs.iterdir()) == []  # nothing is left


def test_a_loader_that_does_not_keep_up_is_no_failure(tmp_path: Path) -> None:
    """Images of 2 million pixels for a small network."""
    for split in ("train", "val"):
        for label in "ab":
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            textured_image(1800, 1200, seed=ord(label)).save(folder / "0.jpg")
            for number in range(1, 8):
                (folder / f"{number}.jpg").hardlink_to(folder / "0.jpg")
    photos = ["data=folder", f"data.root={tmp_path / 'photos'}", "data.image_size=32"]
    few = ["global_batch=8", "cluster.ranks=1", "cluster.threads_per_rank=1"]
    loader = ["data.loader=torchvision", "data.loader_threads=1"]
    status, output = ask([*RUN, f"runs_dir={tmp_path / 'runs'}", *photos, *few, *loader])
    assert status == 0, output
    found = {name: (verdict, text) for verdict, name, text in lines(output)}
    verdict, text = found["loading"]
    assert verdict == "slow", output
    assert "training will wait for data" in text
    assert "short of decoder threads: " in text


@pytest.fixture
def one(digits: Path, tmp_path: Path) -> list[str]:
    """Settings of one rank, which needs no other process."""
    return settings(digits, tmp_path / "runs", "cluster.ranks=1")


def test_data_that_are_not_there(one: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "nowhere", tmp_path / "empty"):
        failed = failures(ask([*one, f"data.root={root}"]))
        assert list(failed) == ["data"]
        missing, make = (
            (root, f", or make it: qsr prepare digits --root {root}")
            if root.name == "nowhere"
            else (root / "train", "")
        )
        assert failed["data"] == (
            f"no folder {missing}: set data.root=PATH to a folder with train/CLASS/* and "
            f"val/CLASS/*{make}"
        )


def test_data_whose_size_nobody_knows(one: list[str], tmp_path: Path) -> None:
    photos = ["data=folder", f"data.root={tmp_path}"]
    failed = failures(ask([*one, *photos]))
    assert failed == {
        "data": f"no folder {tmp_path}/train: set data.root=PATH to a folder with train/CLASS/* "
        "and val/CLASS/*",
        "plan": "unknown without the data: set data.train_images and data.classes, or fix "
        "data.root",
    }


def test_a_batch_of_more_images_than_there_are(one: list[str], own_photos: Path) -> None:
    """Said once, and what depends on the plan is not asked."""
    photos = ["data=folder", f"data.root={own_photos}", "data.image_size=32", "micro_batch=8"]
    photos += ["data.loader=torchvision"]  # which starts faster
    assert failures(ask([*one, *photos, "global_batch=4096"])) == {
        "plan": "global_batch=4096 exceeds the 12 training images: lower global_batch, or train on "
        "more images"
    }


def test_an_image_that_cannot_be_decoded(digits: Path, one: list[str], tmp_path: Path) -> None:
    root = Path(shutil.copytree(digits, tmp_path / "digits"))
    first = sorted((root / "train" / "0").iterdir())[0]
    first.write_bytes(b"no image")
    failed = failures(ask([*one, f"data.root={root}"]))
    assert list(failed) == ["data"]
    assert first.name in failed["data"]


@pytest.mark.parametrize("where", ["runs", "runs/demo"])
def test_a_file_in_the_place_of_the_folder(where: str, one: list[str], tmp_path: Path) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")
    failed = failures(ask(one))
    assert list(failed) == ["run folder"]
    start = f"{run_folder(load_config(one))} cannot be written: choose another runs_dir ([Errno "
    assert failed["run folder"].startswith(start)
    assert f"'{path}" in failed["run folder"]
    assert path.read_text() == "a file"


def test_another_run_or_a_running_one_in_the_folder(one: list[str]) -> None:
    config = load_config([*one, "stop_after_steps=2"])
    build.run(config)
    lock = take(run_folder(config))
    failed = failures(ask(one))
    assert list(failed) == ["run folder"]
    assert "is in use by process" in failed["run folder"]
    assert failed["run folder"].endswith("wait until it ends, or stop it")
    lock.release()
    assert ask(one)[0] == 0
    path = run_folder(config) / "config.yaml"
    path.write_text(path.read_text().replace("alpha: 0.4375", "alpha: 0.3"))
    failed = failures(ask(one))
    assert list(failed) == ["run folder"]
    assert "other settings (sync.alpha: 0.3 -> 0.4375): delete it, or" in failed["run folder"]


def ask_with_mounts(rank: int, ranks: int, runs: Path, size: int, arguments: list[str]) -> Any:
    """Where `runs` is a small disk, or a read-only one."""
    if size:
        small_disk_here(runs, size)
    else:
        mount_here(runs, "-t", "tmpfs", "-o", "ro", "tmpfs")
    return ask(arguments)


@needs_mounts
@pytest.mark.parametrize(
    ("size", "names", "text"),
    [
        (
            1_500_000,
            ["free space"],
            "1.5 MB free, 5.37 MB needed for",
        ),
        (0, ["run folder"], "cannot be written: choose another runs_dir ([Errno 30] Read-only"),
    ],
)
def test_a_disk_that_is_too_small_or_read_only(
    size: int, names: list[str], text: str, one: list[str], tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    (answer,) = run_ranks(ask_with_mounts, 1, tmp_path / "runs", size, one)
    failed = failures(answer)
    assert list(failed) == names
    assert text in failed[names[0]]
    assert "choose" in failed[names[0]]  # the mend


def test_wandb_without_a_key_or_a_network(
    one: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    without_key = failures(ask([*one, "tracking=online"]))
    text = "no API key for api.wandb.ai: run wandb login, or use tracking=offline"
    assert without_key == {"wandb": text}
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    failed = failures(ask([*one, "tracking=online"]))
    assert list(failed) == ["wandb"]
    text = "127.0.0.1 cannot be reached: use tracking=offline ([Errno 111] "
    assert failed["wandb"].startswith(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cluster.ranks=3"], "cluster.ranks=3 does not divide workers=2: every rank holds "
         "the same number of workers; try cluster.ranks=1 or 2"),
        (["cluster.rank=1"], "cluster.rank is not a setting of cluster.launcher=local; did you "
         "mean cluster.ranks?"),
        (["--verbose"], "unknown option --verbose; choose from: --help, "),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_one_line(
    settings: list[str], message: str, tmp_path: Path
) -> None:
    done = call_here("doctor", *RUN, f"runs_dir={tmp_path / 'runs'}", *settings)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"refused: {message}")
    assert list(tmp_path.iterdir()) == []


def test_launched_ranks_that_do_not_divide_the_workers(digits: Path, tmp_path: Path) -> None:
    script = [*DOCTOR[1:], *settings(digits, tmp_path, "workers=3", "global_batch=63")]
    done = call([*TORCHRUN, *script])
    assert done.returncode != 0
    assert "FAIL  2 ranks were launched, which do not divide workers=3" in done.stdout


def rank_with_its_own_disk(rank: int, ranks: int, runs: Path, arguments: list[str]) -> Any:
    """The doctor as one of two ranks, of which the second sees another runs folder."""
    if rank == 1:
        mount_here(runs, "-t", "tmpfs", "tmpfs")
    return ask(arguments)


@needs_mounts
def test_a_rank_that_does_not_see_the_folder(digits: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    arguments = settings(digits, runs)
    main, other = run_ranks(rank_with_its_own_disk, 2, runs, arguments)
    (failed,) = failures(other).items()
    assert failed[0] == "ranks"
    assert failed[1].startswith("rank 1 on ")
    assert failed[1].endswith(f"{runs} is not the same folder as on rank 0: choose a runs_dir that "
                              "all machines share")  # fmt: skip
    status, output = main
    assert (status, "FAIL" in output) == (1, False)  # it knows, and has not waited
    assert list(runs.iterdir()) == []


def test_on_a_login_node(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Slurm: it says so, checks the rest, and how to check the nodes."""
    more = (
        *("cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=0", "cluster.account=lab"),
        *("cluster.ranks_per_node=1", "cluster.cpus_per_task=4", "cluster.partition=gpu"),
        "cluster.setup=[module load cuda]",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    status, output = ask(settings(digits, tmp_path / "runs", *more))
    *checks, last = output.splitlines()
    names = ["data", "network", "plan", "run folder", "free space"]
    names += ["tensorboard", "wandb", "Slurm", "submitit"]
    assert [name for _, name, _ in lines("\n".join(checks))] == names
    assert status == 1
    text = "Slurm does not answer: ask on a login node (sinfo is not installed here)"
    assert f"FAIL  Slurm        {text}" in checks
    assert last.startswith(
        "to check the nodes as well: srun --nodes=2 --ntasks-per-node=1 --cpus-per-task=4 "
        "--partition=gpu --account=lab python -m qsr doctor experiment=demo/quadratic "
        "workers=2 "
    )
    assert last.endswith("'cluster.setup=[module load cuda]'")


def test_data_that_only_the_nodes_see_and_several_runs(tmp_path: Path) -> None:
    """On a login node: no failure, and the first of the runs."""
    only = ("data.root=/nodes/only", "seed=1,2", "cluster=slurm", "cluster.gpus_per_node=0")
    runs = f"runs_dir={tmp_path / 'runs'}"
    _, output = ask([*RUN, *only, "cluster.ranks_per_node=1", runs])
    first, data, *_ = output.splitlines()
    assert first.startswith("for the first of 2 runs, demo/quadratic/")
    assert first.endswith(" seed 1:")
    assert data == "ok    data         /nodes/only is not here: the nodes must see it"
