"""Creating and checking image folders: digits, ImageNet from its archives, subsets.

May import: data and core.
"""
