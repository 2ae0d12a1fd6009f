"""Small networks on letters and digits of unseen fonts: many runs within a given time."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qsr.build import Stopped
from qsr.cluster.group import choose_device
from qsr.config.load import run_folder
from qsr.config.schema import Config
from qsr.errors import DataError, RunFailedError
from qsr.evidence.deep_study import at_rate, peak_rate
from qsr.evidence.pool import process_pool
from qsr.run.environment import environment
from qsr.run.folder import RunFolder, read_rows
from qsr.session import execute
from qsr.sync.topology import Topology


@dataclass(frozen=True)
class GlyphStudy:
    """What is compared; each pair has an experiment evidence/glyphs_MODEL_RULE."""

    models: tuple[str, ...] = ("resnet", "vit")
    rules: tuple[str, ...] = ("parallel", "constant", "matched", "linear", "quadratic", "cubic")
    noises: tuple[float, ...] = (0.2, 0.0)
    """Shares of wrong training labels."""
    rate_factors: tuple[float, ...] = (1.0, 2.0, 0.5)
    """The peak rates of every rule, relative to the experiment's."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    settings: tuple[str, ...] = ()
    """Further settings of every run, for example epochs=5."""


class Trial(NamedTuple):
    """One run of the study."""

    model: str
    rule: str
    noise: float
    rate_factor: float
    seed: int


def trials(study: GlyphStudy) -> list[Trial]:
    """All runs, in the order in which they are worth having: all rules with one seed come before
    the next seed, all seeds before the next network, both networks before another amount of noise,
    and that before another rate."""
    order = itertools.product(
        study.rate_factors, study.noises, study.models, study.seeds, study.rules
    )
    return [Trial(model, rule, noise, factor, seed) for factor, noise, model, seed, rule in order]


def config_of(trial: Trial, settings: Sequence[str]) -> Config:
    """The settings of a run. Raises ConfigError."""
    return replace(_config(trial._replace(seed=1), tuple(settings)), seed=trial.seed)


@functools.cache  # reading the files takes as long as many steps
def _config(trial: Trial, settings: Sequence[str]) -> Config:
    name = f"glyphs_{trial.model}"
    rate = trial.rate_factor * peak_rate(name, trial.rule)
    return at_rate(name, trial.rule, rate, [*settings, f"data.label_noise={trial.noise}"])


Record = dict[str, Any]


def measure_run(trial: Trial, settings: Sequence[str]) -> Record:
    """Execute a run, or what is left of it; all that is reported of it, as values for JSON. A run
    that fails, for example because it diverges, has `failed` instead of results."""
    started = time.perf_counter()
    config = config_of(trial, settings)
    about: Record = {**trial._asdict(), "settings": _recorded(settings)}
    try:
        (outcome,) = execute([config])
        if isinstance(outcome, Stopped):
            raise RunFailedError(f"stopped by {outcome.reason}")
    except DataError:
        raise  # as would be all other runs
    except Exception as error:
        return {**about, "failed": f"{type(error).__name__}: {error}"}
    assert isinstance(outcome, dict)  # a single run that fails raises
    rows, _ = read_rows(RunFolder(run_folder(config)).metrics)
    keys = ("top1", "best_top1", "val_loss", "steps", "averages", "volume", "train_images")
    return {
        **about,
        "rate": config.schedule.peak_lr,
        **{key: outcome[key] for key in keys},
        **{key: outcome[key] for key in ("ema_top1", "uniform_top1") if key in outcome},
        "evaluations": [
            {key: row[key] for key in ("step", "top1", "loss")}
            for row in rows
            if row["kind"] == "eval"
        ],
        "train_loss": [row["loss"] for row in rows if row["kind"] == "train"][-1],
        "train_seconds": outcome["train_seconds"],
        "evaluation_seconds": outcome["evaluation_seconds"],
        "seconds": time.perf_counter() - started,
        "environment": _environment(config.cluster.device),
    }


def _recorded(settings: Sequence[str]) -> list[str]:
    """Without what differs from machine to machine: the places of files, and on what it runs."""
    machine = ("data.root=", "runs_dir=", "cluster.")
    return [text for text in settings if not text.startswith(machine)]


@functools.cache
def _environment(wanted: str) -> Record:
    about = environment(Topology(0, 1, 0, 1), str(choose_device(wanted, 0)))
    del about["host"]  # not for publication
    return about


def missing(study: GlyphStudy, records: Iterable[Record]) -> list[Trial]:
    """The runs that are not among these records."""
    wanted = {*_recorded(study.settings)}  # in any order
    known = {
        Trial(*(record[key] for key in Trial._fields))
        for record in records
        if {*_recorded(record["settings"])} == wanted
    }
    return [trial for trial in trials(study) if trial not in known]


def within(
    waiting: Sequence[Trial],
    settings: Sequence[str],
    *,
    processes: int,
    seconds: float,
    measure: Callable[[Trial, Sequence[str]], Record] = measure_run,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Record]:
    """The records of the runs as they finish, so many at a time. No run is begun that would, if it
    takes as long as the longest so far, end later than `seconds` after the call."""
    started, longest = clock(), 0.0
    following = iter(waiting)
    begun: dict[Future[Record], float] = {}
    with process_pool(processes, __name__) as pool:
        while True:
            while len(begun) < processes and clock() - started + longest < seconds:
                trial = next(following, None)
                if trial is None:
                    break
                begun[pool.submit(measure, trial, settings)] = clock()
            if not begun:
                return
            done, _ = wait(begun, return_when=FIRST_COMPLETED)
            for future in done:
                longest = max(longest, clock() - begun.pop(future))
                yield future.result()
