#!/usr/bin/env python
"""Show the status of runs, or watch them: `qsr status` of this checkout."""

from qsr.cli.status import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
