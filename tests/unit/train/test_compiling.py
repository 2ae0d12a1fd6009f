"""compile=default: the same training from compiled passes, here from those of inductor's C++."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qsr import ConstantSchedule, CosineSchedule, EveryStepRule, Plan, QuadraticRule
from qsr.errors import TrainingError
from qsr.sync.topology import Topology
from qsr.train.compiling import compile_errors, compile_network
from tests.support import Rig, Setup, batchnorm_net, build, run_ranks, sgd, train

COSINE = CosineSchedule(peak_lr=0.1, final_lr=1e-4, warmup_steps=2, total_steps=12)
pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="needs a C++ compiler, as torch does",
)

SETUP = Setup(
    Plan(COSINE, QuadraticRule(h_base=2, alpha=0.15)),
    net=batchnorm_net,  # with dropout
    optimizer=sgd(momentum=0.9, clip_norm=1.0),
    micro_batch=2,
    mixup_alpha=0.2,
    compile="default",
)


@pytest.fixture(autouse=True)
def compiles_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Nothing is compiled yet in this process; all tests of a session share one cache on disk."""
    cache = tmp_path_factory.getbasetemp().parent / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    torch._dynamo.reset()
    counters.clear()
    # precompiled headers, and the trials of what this CPU can do, take longer than all that is
    # compiled here
    with torch._inductor.config.patch({"cpp_cache_precompile_headers": False, "cpp.simdlen": 0}):
        yield
    torch._dynamo.reset()


def test_all_workers_of_a_rank_share_one_compilation(capsys: pytest.CaptureFixture[str]) -> None:
    rig = train(replace(SETUP, workers=4))
    assert counters["frames"] == {"total": 1, "ok": 1}
    assert counters["stats"]["unique_graphs"] == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "compiled" in line]
    assert len(lines) == 1
    assert lines[0].startswith("note: compiled in ")
    assert lines[0].endswith(" s")
    assert len({worker.model.module for worker in rig.workers}) == 4


def test_names_and_initial_weights_are_those_of_eager() -> None:
    eager, compiled = (build(replace(SETUP, compile=how)) for how in ("none", "default"))
    ours, theirs = compiled.workers[0], eager.workers[0]
    assert list(ours.tensors()) == list(theirs.tensors())
    for name, tensor in theirs.tensors().items():
        assert torch.equal(ours.tensors()[name], tensor), name
    assert counters["frames"] == {}  # and compiling waits for the first pass


def test_training_is_eager_training_but_for_rounding() -> None:
    """Without dropout, whose random numbers inductor draws in its own way."""

    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.GELU(), nn.Flatten()
        ).append(nn.Linear(80, 4))

    eager, compiled = (train(replace(SETUP, net=net, compile=how)) for how in ("none", "default"))
    assert torch.allclose(compiled.parameters(), eager.parameters(), rtol=1e-3, atol=1e-5)
    ours, theirs = compiled.trainer.evaluation, eager.trainer.evaluation
    assert ours is not None
    assert theirs is not None
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    assert ours.images == theirs.images


def assert_equal(ours: Rig, theirs: Rig) -> None:
    for a, b in zip(ours.workers, theirs.workers, strict=True):
        for name, tensor in b.tensors().items():
            assert torch.equal(a.tensors()[name], tensor), name
    assert ours.trainer.evaluation == theirs.trainer.evaluation


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"precision": "bf16"}, marks=pytest.mark.slow)], ids=str
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    setup = replace(SETUP, folder=tmp_path, **changes)
    whole = train(replace(setup, folder=None))
    train(replace(setup, stop_after=5))
    torch._dynamo.reset()  # as in a new process
    assert_equal(train(setup), whole)


def test_a_requeued_job_finds_what_was_compiled() -> None:
    train(SETUP)
    torch._dynamo.reset()
    counters.clear()
    train(SETUP)
    assert counters["inductor"]["fxgraph_cache_hit"] == 2  # the forward and the backward pass
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"TORCHINDUCTOR_CACHE_DIR": "given"}, "given"),
        ({"XDG_CACHE_HOME": "cache"}, "cache/qsr/inductor"),
        ({"HOME": "home"}, "home/.cache/qsr/inductor"),
        ({"HOME": "a_file"}, None),
    ],
    ids=str,
)
def test_what_was_compiled_is_kept_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str], expected: str | None
) -> None:
    (tmp_path / "a_file").touch()
    by_torch = str(Path(tempfile.gettempdir()) / "torchinductor_user")  # as it sets it
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", by_torch)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    before = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    compile_network(nn.Linear(1, 1), "none")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == before
    compile_network(nn.Linear(1, 1), "default")
    found = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert found == (by_torch if expected is None else str(tmp_path / expected))


def test_a_network_that_cannot_be_compiled_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    without = torch._inductor.config.patch("cpp.cxx", ("no_such_compiler",))
    with without, pytest.raises(TrainingError) as refused, compile_errors("default"):
        train(SETUP)
    assert "\n" not in str(refused.value)
    assert "no_such_compiler" in str(refused.value)
    assert str(refused.value).endswith(": use compile=none")


DATA_PARALLEL = replace(SETUP, plan=Plan(ConstantSchedule(0.1, 6), EveryStepRule("gradients")))


def _one_of_two(rank: int, ranks: int) -> Tensor:
    return train(DATA_PARALLEL, Topology(rank, ranks, rank, 2)).parameters()


@pytest.mark.slow
def test_ddp_wraps_a_compiled_network() -> None:
    """Two ranks, whose averages overlap with the compiled backward pass, are two workers of one
    rank."""
    first, second = run_ranks(_one_of_two, 2)
    assert torch.equal(first, second)
    together = train(DATA_PARALLEL).parameters()
    assert torch.allclose(first, together, rtol=1e-4, atol=1e-6)
