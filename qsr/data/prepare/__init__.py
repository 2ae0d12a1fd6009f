"""Makes image folders: digits, ImageNet from its archives, subsets; checks and locks them.

May import: data and core.
"""
