#!/usr/bin/env python
"""Check whether a run would start here: `qsr doctor` of this checkout."""

from qsr.cli.doctor import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
