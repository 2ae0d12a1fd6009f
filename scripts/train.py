#!/usr/bin/env python
"""Train or resume one run, or several one after another: `qsr train` of this checkout."""

from qsr.cli.train import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
