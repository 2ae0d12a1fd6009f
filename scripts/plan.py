#!/usr/bin/env python
"""Predict the time and cost of a run before it starts: `qsr plan` of this checkout."""

from qsr.cli.plan import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
