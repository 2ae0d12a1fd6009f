"""The paper in readable form: schedules, rules, plans, sampling, seeds, cost.

May import: standard library only.
"""
