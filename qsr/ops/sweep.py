"""Several runs before they are submitted: what they would take, a line for each setting."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qsr.config.naming import parts_of
from qsr.config.parsing import flatten
from qsr.config.schema import Config, DataConfig
from qsr.data import open_data
from qsr.errors import ConfigError, DataError, UnknownPlanError
from qsr.ops.space import run_sizes, unnamed
from qsr.output import printable
from qsr.planner.forecast import Forecast, forecast, known_classes
from qsr.planner.text import basis_text, hours_text, number_text
from qsr.run.checkpoint import readable
from qsr.train.models import count_parameters

_TITLE_CHARACTERS = 100


def forecast_here(config: Config) -> Forecast:
    """The forecast of a run. Raises DataError if it depends on data that is not on this machine."""
    data = config.data
    if data.train_images is None or data.classes is None:
        images, classes = _counts(data)
        data = replace(data, train_images=images, classes=classes)
    config = replace(config, data=data)
    parameters = count_parameters(config.model, known_classes(config), data.image_size)
    return forecast(config, parameters)


@functools.cache  # the runs of a sweep share it
def _counts(data: DataConfig) -> tuple[int, int]:
    train, _ = open_data(data)
    return len(train), len(train.classes)


def check_one_array(configs: Sequence[Config]) -> None:
    """Raise ConfigError unless the runs can be elements of one job array: they ask for the same
    job, and are stored in the same runs_dir."""
    first, *others = (
        dict(flatten({"cluster": vars(config.cluster), "runs_dir": config.runs_dir}))
        for config in configs
    )
    differing = sorted({n for other in others for n in first if other.get(n) != first[n]})
    if differing:
        raise ConfigError(
            f"these runs ask for different jobs ({', '.join(differing)}): submit them separately"
        )


@dataclass(frozen=True)
class Setting:
    """Runs of a sweep that differ only in their seeds."""

    name: str
    """What differs from other settings, as in "sync.alpha=0.01"."""
    runs: tuple[int, ...]
    """Their numbers in the sweep, from 0: as elements of an array."""
    seeds: tuple[int, ...]
    """The seed of each."""
    forecast: Forecast | None
    """Of each; None if it depends on data that is not here."""
    bytes: int
    """Disk space of each at most; 0 if it is not known."""

    @property
    def steps(self) -> int | None:
        """Of each run, if known."""
        return None if self.forecast is None else self.forecast.plan.total_steps


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep that are to be submitted."""

    title: str
    """What is swept, on one line: the name of the array."""
    settings: tuple[Setting, ...]
    problem: str
    """Why there are no forecasts; empty if there are."""
    absent: tuple[str, ...]
    """Each data.root that is not on this machine."""
    parallel: int | None = None
    """How many may run at once; None: all."""

    @property
    def steps(self) -> list[int | None]:
        """The number of steps of each run, if known."""
        found = {run: setting.steps for setting in self.settings for run in setting.runs}
        return [found[run] for run in sorted(found)]

    def text(self, most_settings: int | None = None) -> str:
        """A line for each setting, but for those beyond `most_settings`, and the totals."""
        shown, count = self.settings[:most_settings], len(self.settings)
        titles = ("run", "setting", "seed", "rounds", "volume %", "hours")
        rows = [titles, *map(_cells, shown)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if len(shown) < count:
            lines.append(f"... {count - len(shown)} more settings, in the order of their lists")
        lines += (f"data.root={root} is not here: the nodes must see it" for root in self.absent)
        return "\n".join([self.title, *lines, self._totals()])

    def _totals(self) -> str:
        runs = sum(len(setting.runs) for setting in self.settings)
        steps = set(self.steps)
        total = f"{runs} runs"
        if self.problem:
            return f"{total}; {self.problem}"
        if len(steps) == 1:
            total += f" of {steps.pop():,} steps"
        space = sum(len(setting.runs) * setting.bytes for setting in self.settings)
        return f"{total}, up to {readable(space)} on disk; {self._hours()}"

    def _hours(self) -> str:
        hours = gpu_hours = 0.0
        unverified, bases = "", set()
        for setting in self.settings:
            assert setting.forecast is not None  # there is no problem
            planned = setting.forecast.planned
            if planned.cost is None:
                return setting.forecast.why_no_times
            hours += len(setting.runs) * planned.cost.total_seconds / 3600
            gpu_hours += len(setting.runs) * planned.cost.gpu_hours
            if "total" in setting.forecast.unverified(planned):
                unverified = "?"
            bases.add(basis_text(planned))
        together = ""
        if self.parallel is not None:
            together = f", about {number_text(hours / self.parallel)} with {self.parallel} at once"
        return (
            f"{number_text(hours)}{unverified} hours in total ({', '.join(sorted(bases))})"
            f"{together}, {number_text(gpu_hours)} GPU hours"
        )


def read_sweep(configs: Sequence[Config], swept: Sequence[Mapping[str, str]]) -> Sweep:
    """`swept`: what is swept, and the values that each of the runs has."""
    groups: dict[str, list[int]] = {}
    for run, values in enumerate(swept):
        words = (f"{name}={value}" for name, value in values.items() if name != "seed")
        groups.setdefault(printable(" ".join(words)), []).append(run)
    settings, problem = [], ""
    for name, runs in groups.items():
        config = configs[runs[0]]
        found, size = None, 0
        try:
            found = forecast_here(config)
            each, results = run_sizes(
                found.config, found.plan, unnamed(known_classes(found.config))
            )
            size = (config.checkpoint.keep + 1) * each + results
        except UnknownPlanError as error:
            problem = str(error)
        except DataError as error:
            problem = f"no plan here: the nodes must see the data; {error}"
        seeds = tuple(configs[run].seed for run in runs)
        settings.append(Setting(name or config.experiment, tuple(runs), seeds, found, size))
    roots = dict.fromkeys(config.data.root for config in configs)
    absent = () if problem else tuple(root for root in roots if not Path(root).is_dir())
    parallel = getattr(configs[0].cluster, "parallel", None)
    return Sweep(sweep_title(configs, swept), tuple(settings), problem, absent, parallel)


def sweep_title(configs: Sequence[Config], swept: Sequence[Mapping[str, str]]) -> str:
    """As in "demo/quadratic sync.alpha=0.01,0.0175 seed=1,2,3"; without values if they are long."""
    lists = {name: dict.fromkeys(values[name] for values in swept) for name in swept[0]}
    words = [f"{name}={','.join(values)}" for name, values in lists.items()]
    if "experiment" not in lists:
        words.insert(0, parts_of(configs[0].experiment)[0])
    title = printable(" ".join(words))
    return title if len(title) <= _TITLE_CHARACTERS else printable(" ".join([words[0], *lists]))


def _cells(setting: Setting) -> tuple[str, ...]:
    found = setting.forecast
    plan = (
        ("-", "-", "-")
        if found is None
        else (
            f"{found.plan.num_rounds:,}",
            f"{100 * found.plan.volume:.1f}",
            hours_text(found, found.planned, "total"),
        )
    )
    return (_ranges(setting.runs), setting.name, _ranges(setting.seeds), *plan)


def _ranges(numbers: Sequence[int]) -> str:
    """As Slurm writes them: "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)
