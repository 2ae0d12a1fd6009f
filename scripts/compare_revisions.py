#!/usr/bin/env python
"""Does this working tree compute what an earlier revision does? For changes that must not matter.

    python scripts/compare_revisions.py REVISION

Runs both side by side on digits: five runs of two ranks, whose final weights must be equal byte for
byte; a run that REVISION begins and the working tree resumes; the composed settings of every
experiment, key by key; what scripts/plan.py predicts, but for the words of its notes. Prints one
line each, and every difference. Takes about 8 minutes on 2 cores. Exit status: 0 equal, 1
different.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsr.data.prepare.digits import prepare_digits
from qsr.output import program
from qsr.run.folder import MODEL_NAME

ROOT = Path(__file__).parents[1]
QSR = ["experiment=demo/quadratic"]
RUNS = {
    "data parallel": ["experiment=demo/parallel"],
    "constant H": ["experiment=demo/constant"],
    "QSR": QSR,
    "QSR, delayed averages": [*QSR, "sync.delay_steps=2"],
    "post-local": ["experiment=demo/constant", "sync=post_local", "sync.switch_epoch=1"],
}
SMALL = [
    *("workers=2", "cluster.ranks=2", "cluster.threads_per_rank=1", "epochs=2", "seed=3"),
    *("schedule.warmup_epochs=1", "tracking=none", "tracking.progress=false"),
]
PLANS = ("vit_b16_b4096/parallel", "vit_b16_b4096/quadratic_h4", "resnet152_b4096/quadratic_h2")
SETTINGS = """
import json, pathlib
from qsr.config.load import CONFIG_DIR, load_config, to_dict
folder = pathlib.Path(CONFIG_DIR) / "experiment"
paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml")]
names = sorted(path.as_posix() for path in paths)
print(json.dumps({name: to_dict(load_config([f"experiment={name}"])) for name in names}))
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision")
    revision = parser.parse_args(arguments).revision
    with tempfile.TemporaryDirectory() as temporary:
        before, folder = Path(temporary) / "before", Path(temporary)
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), revision], check=True)
        try:
            prepare_digits(folder / "digits")
            found = [*_weights(before, folder), *_settings(before), *_plans(before)]
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    for line, _ in found:
        print(line)
    return 0 if all(equal for _, equal in found) else 1


def _weights(before: Path, folder: Path) -> Iterator[tuple[str, bool]]:
    for name, settings in RUNS.items():
        place = folder / name.replace(" ", "_")
        first = _train(before, folder, place / "before", settings)
        equal = first == _train(ROOT, folder, place / "now", settings)
        yield f"{name}: final weights {'equal' if equal else 'DIFFERENT'}", equal
        if settings == QSR:
            _train(before, folder, place / "resumed", [*settings, "stop_after_steps=19"])
            equal = first == _train(ROOT, folder, place / "resumed", settings)
            yield f"{name}, begun there, resumed here: {'equal' if equal else 'DIFFERENT'}", equal


def _train(code: Path, folder: Path, runs: Path, settings: list[str]) -> bytes | None:
    data = [f"data.root={folder / 'digits'}", f"runs_dir={runs}"]
    _call(code, [str(code / "scripts" / "train.py"), *settings, *SMALL, *data])
    return next((path.read_bytes() for path in runs.rglob(MODEL_NAME)), None)


def _settings(before: Path) -> Iterator[tuple[str, bool]]:
    then, now = (json.loads(_call(code, ["-c", SETTINGS])) for code in (before, ROOT))
    lines = list(_differences(then, now))
    yield f"settings of {len(then)} experiments: {len(lines)} differences", not lines
    yield from ((line, False) for line in lines)


def _plans(before: Path) -> Iterator[tuple[str, bool]]:
    for name in PLANS:
        then, now = (json.loads(_call(code, _plan_command(code, name))) for code in (before, ROOT))
        lines = [line for line in _differences(then, now) if not line.startswith("  notes:")]
        yield f"plan of {name}: {len(lines)} differences", not lines
        yield from ((line, False) for line in lines)


def _plan_command(code: Path, experiment: str) -> list[str]:
    # earlier revisions have the speeds in the group cluster
    group = "speed" if (code / "configs" / "speed").is_dir() else "cluster"
    return ["scripts/plan.py", "--json", f"experiment={experiment}", f"{group}=paper_2x8"]


def _differences(then: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted(then.keys() | now.keys()):
            yield from _differences(then.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif then != now:
        yield f"  {key}: {then!r} -> {now!r}"


def _call(code: Path, arguments: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=code, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


if __name__ == "__main__":
    program(main)
