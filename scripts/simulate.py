#!/usr/bin/env python
"""Show the rules' effect on generalization on small problems, in minutes.

    python scripts/simulate.py                                     all studies: make evidence
    python scripts/simulate.py experiment=digits_mlp        one, or several with commas
    python scripts/simulate.py experiment=digits_mlp workers=32 seeds=4
    python scripts/simulate.py drift                               the drift along a valley
    python scripts/simulate.py figures                             draw again, from the records

Prints a table for each study. If no setting was changed, also writes NAME.json to
results/evidence/simulations/. Without arguments also draws all figures.
docs/evidence-simulations.md explains them. Exit status: 0 done, 2 refused.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from qsr.cli.options import print_help, print_settings, read
from qsr.config.overrides import expand_sweeps
from qsr.errors import ConfigError, showing_errors
from qsr.evidence.arms import ArmFound
from qsr.evidence.drift import Drift
from qsr.evidence.settings import (
    SIMULATIONS,
    SimulationConfig,
    load_simulation,
    simulation_names,
)
from qsr.evidence.studies import (
    DriftCase,
    drift_cases,
    drift_record,
    run_studies,
    simulation_record,
)
from qsr.output import program
from qsr.report.evidence import drift_markdown, simulation_markdown
from qsr.report.evidence_controls import draw
from qsr.run.folder import write_json

RESULTS = Path(__file__).parents[1] / "results"


@showing_errors
def main(arguments: list[str]) -> int:
    line = read(arguments)
    settings = line.settings
    if "--help" in line.given:
        print_help(__doc__, line.folders, base=SIMULATIONS, only=("experiment",))
        return 0
    if "--cfg" in line.given:
        print_settings(line, _simulations(settings, line.folders))
        return 0
    if settings == ["figures"]:
        draw(RESULTS)
        return 0
    started = time.monotonic()
    everything, drift = not settings, settings == ["drift"]
    simulations = {} if drift else _simulations(settings, line.folders)
    cases = drift_cases() if everything or drift else []
    outcomes: dict[str, dict[str, ArmFound]] = {name: {} for name in simulations}
    drifts: dict[DriftCase, Drift] = {}
    for what, found in run_studies(simulations, cases):
        if isinstance(what, DriftCase):
            assert isinstance(found, Drift)
            drifts[what] = found
            if len(drifts) == len(cases):
                drift_found = drift_record({case: drifts[case] for case in cases})
                _write("drift", drift_found)
                print(f"\n{drift_markdown(drift_found)}", flush=True)
            continue
        assert isinstance(found, ArmFound)
        name, rule = what
        outcomes[name][rule] = found
        if len(outcomes[name]) == len(simulations[name].rules):
            record = simulation_record(name, simulations[name], outcomes[name])
            print(f"\n{name}\n\n{simulation_markdown(record)}", flush=True)
            if everything or all(setting.startswith("experiment=") for setting in settings):
                _write(name, record)
    if everything:
        draw(RESULTS)
    print(f"{time.monotonic() - started:.0f} s")
    return 0


def _simulations(settings: list[str], more: Sequence[Path]) -> dict[str, SimulationConfig]:
    """Simulations by experiment name and changed settings. Raises ConfigError."""
    if not settings:
        return {name: load_simulation([f"experiment={name}"]) for name in simulation_names()}
    simulations = {}
    for overrides in expand_sweeps(settings, (SIMULATIONS, *more)):
        names = [o.partition("=")[2] for o in overrides if o.startswith("experiment=")]
        if not names:
            raise ConfigError(
                f"no experiment given: set experiment=NAME, one of {', '.join(simulation_names())}"
            )
        others = [o for o in overrides if not o.startswith("experiment=")]
        simulations[" ".join([names[-1], *others])] = load_simulation(overrides, more)
    return simulations


def _write(name: str, record: dict[str, object]) -> None:
    folder = RESULTS / "evidence" / "simulations"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", record)


if __name__ == "__main__":
    program(main)
