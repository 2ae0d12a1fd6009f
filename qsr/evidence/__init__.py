"""Argues: simulations and small deep networks on which the effect of a rule is seen.

May import: session and below.
"""
