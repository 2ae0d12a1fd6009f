"""Benchmarks, one program per question. docs/performance.md shows the results."""
