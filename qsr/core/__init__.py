"""The arithmetic of a run: schedules, rules, plans, sampling, seeds. Standard library only."""
