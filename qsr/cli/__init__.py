"""The command `qsr`: one module for each of its commands, which scripts/ starts too.

May import: everything.
"""
