"""failure.json: who failed first, of this attempt."""

import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from qsr.cluster.failures import describe, read_failure, record_failure
from qsr.cluster.place import Place, find_place
from qsr.errors import DataError, RunFailedError, TrainingError

RANK_0 = Place(0, 2, 0, 1, attempt="4711.0.0", launched=True, slurm=None)
RANK_1 = replace(RANK_0, rank=1)
REQUEUED = replace(RANK_1, attempt="4711.1.0")


def raised(error: Exception) -> Exception:
    """With a traceback."""
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "failure.json"


def test_the_first_failure_stays(path: Path) -> None:
    assert record_failure(path, RANK_1, raised(DataError("bad.jpg: no image"))) is None
    later = record_failure(path, RANK_0, raised(RuntimeError("Connection closed by peer")))
    assert later == "rank 1: DataError: bad.jpg: no image"  # what the user gets to see
    record = read_failure(path)
    assert record is not None
    assert (record["rank"], record["attempt"]) == (1, "4711.0.0")
    assert record["error"] == "DataError: bad.jpg: no image"


def test_an_unforeseen_error_comes_with_its_traceback(path: Path) -> None:
    record_failure(path, RANK_1, raised(ZeroDivisionError("division by zero")))
    later = record_failure(path, RANK_0, raised(RuntimeError("Connection closed by peer")))
    assert later is not None
    assert later.splitlines()[:2] == [
        "rank 1: ZeroDivisionError: division by zero",
        "Traceback (most recent call last):",
    ]
    assert "in raised" in later
    assert describe(3, TrainingError("loss is nan")) == "rank 3: TrainingError: loss is nan"
    assert describe(0, RunFailedError("rank 2 is gone")) == "rank 2 is gone"


def test_what_all_ranks_find_each_tells_as_its_own(path: Path) -> None:
    """So that a refusal is one on every rank, whichever was first."""
    for place in (RANK_1, RANK_0):
        assert record_failure(path, place, raised(DataError("other data"))) is None
    record = read_failure(path)
    assert record is not None
    assert record["rank"] == 1


def test_another_attempt_replaces_it(path: Path) -> None:
    record_failure(path, RANK_1, raised(DataError("of the first start")))
    assert record_failure(path, REQUEUED, raised(DataError("of the second"))) is None
    record = read_failure(path)
    assert record is not None
    assert (record["attempt"], record["error"]) == ("4711.1.0", "DataError: of the second")


def test_an_earlier_start_of_the_same_name_is_not_shown(path: Path) -> None:
    """torchrun gives each start the same name: what was written before this process began is not
    of this start."""
    began = time.time()
    first = replace(RANK_1, attempt="none.0", since=began - 60)
    assert record_failure(path, first, raised(DataError("of the first start"))) is None
    of_the_same = replace(RANK_0, attempt="none.0", since=began - 59)
    later = record_failure(path, of_the_same, raised(RuntimeError("Connection closed by peer")))
    assert later == "rank 1: DataError: of the first start"
    second = replace(RANK_0, attempt="none.0", since=time.time())
    assert record_failure(path, second, raised(DataError("of the second"))) is None
    restarted = replace(RANK_0, attempt="none.1", since=began - 60)
    assert record_failure(path, restarted, raised(DataError("of a restart"))) is None
    record = read_failure(path)
    assert record is not None
    assert record["error"] == "DataError: of a restart"


@pytest.mark.parametrize("text", ["5", "[]", "{}", '{"attempt": 1}', "[" * 100_000])
def test_a_file_of_another_shape_is_no_failure(text: str, path: Path) -> None:
    path.write_text(text)
    assert read_failure(path) is None
    assert record_failure(path, RANK_0, raised(DataError("x"))) is None


def test_when_this_process_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    since = find_place().since
    assert since is not None
    assert since == pytest.approx(psutil.Process().create_time(), abs=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "qsr-ranks-1")
    assert find_place().since is None


def test_without_a_folder_or_with_a_damaged_file_each_rank_tells_its_own(tmp_path: Path) -> None:
    assert (
        record_failure(tmp_path / "none" / "failure.json", RANK_0, raised(DataError("x"))) is None
    )
    assert read_failure(tmp_path / "none" / "failure.json") is None
    path = tmp_path / "failure.json"
    path.write_text('{"attempt": "4711.0.0", "ra')  # another rank is writing it
    assert record_failure(path, RANK_0, raised(DataError("x"))) is None
    assert path.read_text() == '{"attempt": "4711.0.0", "ra'
