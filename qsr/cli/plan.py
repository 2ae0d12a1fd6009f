"""Predict the time and cost of a run before it starts.

    qsr plan experiment=vit_b16_b4096/quadratic_h4 speed=paper_2x8
    qsr plan experiment=... sync.alpha=0.01,0.0175,0.03      one row per value
    qsr plan solve hours=22 experiment=... speed=NAME        alpha for a budget of hours
    qsr plan solve volume=10 experiment=...                  alpha for a volume, in percent
    qsr plan calibrate experiment=... name=NAME              measure these machines
    qsr plan what-if                 where QSR pays, by link, workers and GPU

Takes the settings of `qsr train`. --json prints one JSON object instead; --figure FILE draws
FILE.png and FILE.svg. solve gives the smallest alpha for each H_base: QSR replaces the run's rule,
all else stays. calibrate writes ~/.config/qsr/speed/NAME.yaml (or DIR/speed/NAME.yaml, with
--config-dir DIR), for use as speed=NAME; start it with torchrun on several machines.
docs/planning.md explains the predictions.
Exit status: 0 done, 1 failed, 2 wrong settings, 130 interrupted.
"""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from qsr.cli.options import CommandLine, answer, read
from qsr.cli.usage import OWN_OPTIONS
from qsr.cluster.place import find_place
from qsr.config.load import load_config
from qsr.config.places import user_folder
from qsr.config.planning import make_plan
from qsr.config.quadratic import with_quadratic_rule
from qsr.config.schema import Config
from qsr.errors import ConfigError, UnknownPlanError, showing_errors
from qsr.output import in_words_of_caller, printer, program, warn
from qsr.planner import as_json as planner_json
from qsr.planner import profiles, solve_text
from qsr.planner import text as planner_text
from qsr.planner.forecast import forecast, known_classes, known_images
from qsr.planner.solve import solve
from qsr.planner.what_if import all_cases


@showing_errors
def main(arguments: list[str]) -> int:
    commands = {"calibrate": calibrate, "solve": solve_budget, "what-if": what_if}
    name, *others = arguments or [""]
    line = read(others if name in commands else arguments, _OWN)
    if name in commands and "--help" not in line.given:
        return commands[name](line)
    status = answer(line, __doc__, OWN_OPTIONS["plan"])
    return plan(line) if status is None else status


def plan(line: CommandLine) -> int:
    """Predict a run, or each run of a sweep."""
    options = _options(line)
    swept = line.swept()
    configs = line.configs()
    try:
        forecasts = [forecast(config, _parameters(config)) for config in configs]
    except UnknownPlanError as error:
        if swept[0] or options.figure:
            raise
        _print_not_known(configs[0], error, as_json=options.json)
        return 0
    if options.json:
        records = [planner_json.forecast_record(found) for found in forecasts]
        rows = [{"settings": s, **record} for s, record in zip(swept, records, strict=True)]
        _print_json({"sweep": rows} if swept[0] else records[0])
    elif swept[0]:
        planner_text.print_sweep(swept, forecasts)
    else:
        planner_text.print_forecast(forecasts[0])
    if options.figure:
        from qsr.report.plan_plots import plan_figure  # matplotlib takes a second

        plans = forecasts[0].plans()
        if swept[0]:
            labels = (", ".join(f"{k}={v}" for k, v in values.items()) for values in swept)
            plans = {label: found.plan for label, found in zip(labels, forecasts, strict=True)}
        epochs = {found.steps_per_epoch for found in forecasts}
        _save(plan_figure(plans, epochs.pop() if len(epochs) == 1 else None), options.figure)
    return 0


def _print_not_known(config: Config, reason: UnknownPlanError, *, as_json: bool) -> None:
    if as_json:
        values = dict.fromkeys(("rounds", "volume", "methods"))
        _print_json({"experiment": config.experiment, **values, "notes": [str(reason)]})
    else:
        print(f"{config.experiment}\n{reason}")


def solve_budget(line: CommandLine) -> int:
    """Find the quadratic rules that keep to a budget of hours or of communication volume."""
    options = _options(line)
    budgets = [text for text in line.settings if text.partition("=")[0] in ("hours", "volume")]
    if len(budgets) != 1:
        raise ConfigError("solve needs one budget: hours=22, or volume=10 for 10 %")
    given = [text for text in line.settings if text not in budgets]
    found = with_quadratic_rule(given, line.folders)
    solution = solve(found.config, budgets[0], _parameters(found.config))
    words = [*replace(line, settings=found.settings).words, *solution.rule_settings]
    if options.json:
        _print_json(planner_json.solution_record(solution))
    else:
        solve_text.print_solution(solution, found.replaced, f"qsr plan {shlex.join(words)}")
    if options.figure:
        from qsr.report.plan_plots import plan_figure  # matplotlib takes a second

        plan = make_plan(solution.config, known_images(solution.config))
        label = solution.config.sync.label
        _save(plan_figure({label: plan}, solution.steps_per_epoch), options.figure)
    return 0


def what_if(line: CommandLine) -> int:
    """Compare QSR with data parallel training over links, workers, GPUs and networks."""
    options = _options(line)
    if line.words:
        raise ConfigError(f"what-if takes no settings: remove {line.words[0]}")
    cases = list(all_cases())
    if options.json:
        _print_json(planner_json.what_if_record(cases))
    else:
        planner_text.print_what_if(cases)
    if options.figure:
        from qsr.report.cost_plots import what_if_figure  # matplotlib takes a second

        _save(what_if_figure(), options.figure)
    return 0


def calibrate(line: CommandLine) -> int:
    """Measure these machines and write or update a speed profile."""
    names = [text.partition("=")[2] for text in line.settings if text.startswith("name=")]
    if len(names) != 1:
        raise ConfigError("calibrate needs name=NAME, and measures the profile for speed=NAME")
    path = profiles.profile_path(names[0], line.config_dir or user_folder())
    stored = profiles.read_profile(path) if path.exists() else None
    settings = [text for text in line.settings if not text.startswith("name=")]
    config = load_config(settings, more=line.folders)
    images, classes = known_images(config), known_classes(config)

    from qsr.cluster.processes import start_ranks
    from qsr.planner.calibrate import measure
    from qsr.run.folder import write_text
    from qsr.session import number_of_ranks
    from qsr.train.models import check_network  # torch takes seconds to import

    check_network(config)
    command = " ".join(["qsr plan calibrate", *line.words])
    ranks = number_of_ranks(config)
    found = start_ranks(measure, ranks, config, classes, images, command)
    if find_place().rank == 0:
        profile = profiles.updated_profile(names[0], stored, found)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, profiles.profile_text(profile))
        planner_text.print_calibration(profile, found)
        words = [word for word in line.words if not word.startswith("name=")]
        use = f"qsr plan {shlex.join(words)} speed={names[0]}"
        print(f"wrote {path}\nuse it with speed={names[0]}: {in_words_of_caller(use)}")
    return 0


def _parameters(config: Config) -> int | None:
    """Number of parameters of a network that must be built to count them; otherwise None."""
    if config.model.name not in ("timm", "custom"):
        return None

    from qsr.train.models import check_model, count_parameters

    check_model(config.model, config.data.image_size)
    return count_parameters(config.model, known_classes(config), config.data.image_size)


def _save(figure: Any, path: Path) -> None:
    """Save a matplotlib figure, untyped here because matplotlib is imported only if needed."""
    from qsr.report.style import save

    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    save(figure, stem)
    warn(f"wrote {stem}.png and {stem}.svg")


def _print_json(record: Any) -> None:
    print(json.dumps(record, indent=2, allow_nan=False))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


_OWN = {"--json": False, "--figure": True}


def _options(line: CommandLine) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path)
    return parser.parse_args(line.own)


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    (program if sys.argv[1:2] == ["calibrate"] else printer)(main)
