"""Decides: schedules, rules, plan, sampling, seeds, cost: the paper in readable form.

May import: standard library only.
"""
