"""Local SGD under other people's trainers. Each module needs the library it is named after, which
is not among qsr's dependencies but an extra: `pip install -e .[accelerate]` or `.[lightning]`.
"""
