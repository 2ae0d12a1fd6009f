#!/usr/bin/env python
"""Validate a trained model, or published weights: `qsr evaluate` of this checkout."""

from qsr.cli.evaluate import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
