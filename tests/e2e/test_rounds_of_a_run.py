"""Rounds that follow the loss, and rounds from a file: a run, its report, its replay."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsr import build
from qsr.cli import plan, report
from qsr.config.load import load_config, run_folder
from qsr.config.planning import make_plan, plan_to_follow
from qsr.config.replay import rounds_of
from qsr.config.schema import Config
from qsr.core.open_plan import OpenPlan
from qsr.errors import ConfigError
from tests.cli import call, command, folder_in, refusal, same_weights

ADAPTIVE = ("sync=adaptive", "sync.h=6")


def rounds_in(folder: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "round"]


def assert_same_model(one: Path, other: Path) -> None:
    """Tensor by tensor, because their metadata differ."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def adaptive(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adaptive run of two processes."""
    runs = tmp_path_factory.mktemp("adaptive")
    done = call(command(digits, runs, *ADAPTIVE))
    assert done.returncode == 0, done.stderr
    return folder_in(runs)


def test_a_run_whose_rounds_are_not_planned(
    adaptive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds, summary = rounds_in(adaptive), json.loads((adaptive / "summary.json").read_text())
    assert sum(row["h"] for row in rounds) == summary["steps"] == 44
    assert len(rounds) == summary["averages"]
    assert len({row["h"] for row in rounds[:-1]}) > 1
    assert summary["planned"] == {}
    assert report.main([str(adaptive)]) == 0
    assert "adaptive from H = 6" in capsys.readouterr().out


@pytest.mark.slow  # tests/unit/train/test_adaptive_rounds.py is quick
def test_stopped_within_a_round_and_resumed_it_has_the_same_bits(
    digits: Path, tmp_path: Path, adaptive: Path
) -> None:
    starts = {int(row["step"] - row["h"]) for row in rounds_in(adaptive)}
    middle = next(step for step in range(20, 44) if step not in starts)
    first = call(command(digits, tmp_path, *ADAPTIVE, f"stop_after_steps={middle}"))
    assert first.returncode == 0, first.stderr
    assert call(command(digits, tmp_path, *ADAPTIVE)).returncode == 0
    assert same_weights(folder_in(tmp_path), adaptive)
    assert rounds_in(folder_in(tmp_path)) == rounds_in(adaptive)


@pytest.mark.slow  # the next one is quick
def test_a_replay_of_two_processes_has_the_same_bits(
    digits: Path, tmp_path: Path, adaptive: Path
) -> None:
    file = tmp_path / "rounds.txt"
    file.write_text(rounds_of(str(adaptive)))
    run = command(digits, tmp_path / "runs", "sync=replay", f"sync.file={file}")
    done = call(run)
    assert done.returncode == 0, done.stderr
    assert_same_model(folder_in(tmp_path / "runs"), adaptive)
    file.write_text("44x1")
    assert "sync.rounds: " in refusal(run)


def test_its_replay_has_the_same_bits_and_other_rounds_do_not_resume_it(
    digits: Path, tmp_path: Path, adaptive: Path
) -> None:
    def here(name: str, *rule: str) -> Config:
        """In this process, which holds both workers."""
        return load_config(command(digits, tmp_path / name, *rule, "cluster.ranks=1")[2:])

    first = here("adaptive", *ADAPTIVE)
    build.run(first)
    lengths, of_two = (
        [row["h"] for row in rounds_in(run)] for run in (run_folder(first), adaptive)
    )
    assert lengths == of_two
    file = tmp_path / "rounds.txt"
    file.write_text(rounds_of(str(run_folder(first))))
    again = here("replay", "sync=replay", f"sync.file={file}")
    build.run(again)
    assert_same_model(run_folder(again), run_folder(first))
    file.write_text("44x1")
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(sync\.rounds: "):
        build.prepare(here("replay", "sync=replay", f"sync.file={file}"))


def test_the_planner_knows_the_rounds_of_a_file_and_not_those_of_the_loss(
    tmp_path: Path, adaptive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=demo/quadratic", *ADAPTIVE]
    line = "sync=adaptive: rounds, volume and hours are not known before the run"
    assert plan.main(words) == 0
    assert line in capsys.readouterr().out
    assert plan.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rounds"], found["volume"]) == (None, None)
    assert line in found["notes"][0]
    assert plan.main(["experiment=demo/quadratic", "sync=adaptive", "sync.h=4,6"]) == 2
    assert line in capsys.readouterr().err
    config = load_config(
        [
            *("experiment=demo/quadratic", "epochs=2", "schedule.warmup_epochs=1"),
            *("sync=replay", f"sync.file={adaptive}"),
        ]
    )
    assert [r.length for r in make_plan(config, 22 * 64).rounds()] == [
        row["h"] for row in rounds_in(adaptive)
    ]
    by_hand = tmp_path / "mine.txt"
    by_hand.write_text("# first short, then long\n10x4 2x8\n274\n")
    assert plan.main(["experiment=demo/quadratic", "sync=replay", f"sync.file={by_hand}"]) == 0
    assert "13 rounds, volume 3.9 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "rounds.txt cannot be read (No such file or directory)"),
        ("4 4 x", "line 1: 'x' is not a round: write H, or COUNTxH for several"),
        ("10x4", "its rounds have 40 steps, but the run has 330: add rounds, or shorten the run"),
    ],
)
def test_a_file_without_the_rounds_is_refused(
    text: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "rounds.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(["experiment=demo/quadratic", "sync=replay", f"sync.file={file}"])
    assert str(error.value).startswith(f"sync.file={file}: ")
    assert message in str(error.value)


def test_a_run_folder_without_its_rounds_is_refused(adaptive: Path, tmp_path: Path) -> None:
    lines = (adaptive / "metrics.jsonl").read_text().splitlines()
    file = tmp_path / "metrics.jsonl"
    for kept, message in (
        ([line for line in lines if '"round",' not in line], "only adaptive runs log theirs"),
        ([line for line in lines if '"round": 1,' not in line], "some of its rounds are missing"),
    ):
        file.write_text("\n".join(kept))
        with pytest.raises(ConfigError, match=message):
            rounds_of(str(tmp_path))
    with pytest.raises(ConfigError, match=r"sync\.rounds is filled in by qsr from sync.file"):
        load_config(
            ["experiment=demo/quadratic", "sync=replay", "sync.file=x", "+sync.rounds=330x1"]
        )


def test_a_rule_of_ones_own_may_follow_the_loss() -> None:
    own = ["sync=custom", "sync.target=qsr:AdaptiveRule", "sync.options={h:6}"]
    config = load_config(["experiment=demo/quadratic", *own])
    plan = plan_to_follow(config, 1442)
    assert isinstance(plan, OpenPlan)
    for round_, loss in zip(plan.rounds(), (2.0, 0.5), strict=False):
        assert round_.length == 6
        plan.observe(loss)
    assert plan.round_at(12).length == 3  # a quarter of the loss
