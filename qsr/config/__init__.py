"""Settings: how they are composed and checked, and the plan that follows from them.

May import: core; no torch.
"""
