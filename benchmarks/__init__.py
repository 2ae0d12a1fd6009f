"""Measurements: one program for each question. docs/performance.md shows what they found."""
