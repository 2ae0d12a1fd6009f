"""Averages over the workers: from one all-reduce to the rounds of a plan.

May import: torch and core only.
"""
