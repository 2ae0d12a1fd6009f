#!/usr/bin/env python
"""Submit runs to a Slurm cluster, `qsr submit` of this checkout."""

from qsr.cli.submit import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
