"""Attends: submits jobs, shows their status, examines machines (doctor).

May import: everything.
"""
