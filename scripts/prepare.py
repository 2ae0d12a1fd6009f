#!/usr/bin/env python
"""Create and check data sets: `qsr prepare` of this checkout, with the digits in its data/."""

from pathlib import Path

from qsr.cli.prepare import run

if __name__ == "__main__":
    run(Path(__file__).resolve().parents[1] / "data")
