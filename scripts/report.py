#!/usr/bin/env python
"""Compare runs: `qsr report` of this checkout."""

from qsr.cli.report import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
