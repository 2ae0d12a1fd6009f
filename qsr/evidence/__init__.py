"""Evidence: simulations and small deep networks that show the effect of a rule.

May import: session and below.
"""
