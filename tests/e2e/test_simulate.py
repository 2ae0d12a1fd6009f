"""scripts/simulate.py as a user gives it."""

import sys

import pytest

from tests.cli import ROOT, call, call_here

SMALL = ("experiment=diagonal", "seeds=2", "total_steps=40", "workers=2")


def test_settings_of_the_command_line_print_a_table_and_write_nothing() -> None:
    records = ROOT / "results" / "evidence" / "simulations"
    before = {path: path.stat().st_mtime_ns for path in records.iterdir()}
    done = call(
        [sys.executable, str(ROOT / "scripts" / "simulate.py"), *SMALL, "label_noise=0.5,1.0"]
    )
    assert (done.returncode, done.stderr) == (0, "")
    for noise in ("0.5", "1.0"):
        assert f"diagonal seeds=2 total_steps=40 workers=2 label_noise={noise}" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * (1 + 5)
    assert {path: path.stat().st_mtime_ns for path in records.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workers=2"], "no experiment given: set experiment=NAME, one of diagonal, "),
        (["experiment=diagonl"], "did you mean diagonal"),
        ([*SMALL, "local_bach=2"], "did you mean local_batch"),
        (["drift", "workers=2"], "drift"),
    ],
)
def test_what_is_wrong_is_refused_in_a_line(arguments: list[str], message: str) -> None:
    done = call_here("simulate", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("refused: ")
    assert message in line


def test_the_options_of_hydras_users() -> None:
    shown = call_here("simulate", *SMALL, "--cfg", "job", "-p", "seeds")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == "# diagonal seeds=2 total_steps=40 workers=2\n2\n"
    helped = call_here("simulate", "--help").stdout.splitlines()
    assert any(line.startswith("  digits_mlp_relu ") for line in helped)
    assert any(line.startswith("  --config-dir DIR ") for line in helped)
