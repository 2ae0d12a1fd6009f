"""Named random streams.

Every random choice of a run uses a named seed, for example
`seed_for(1, "augment", worker=3, step=7)`. No generator keeps its state from step to step, so a run
that resumes at step 7 draws the same numbers as an uninterrupted run, and so does a worker whether
or not it shares its process with others.
"""

import hashlib


def seed_for(root: int, name: str, **coordinates: int) -> int:
    """A 63-bit seed for the stream `name` at `coordinates` of the run with seed `root`.

    Different names, coordinates or roots give independent streams; the order of the coordinates
    does not matter.
    """
    text = f"{root}/{name}/" + ",".join(f"{key}={coordinates[key]}" for key in sorted(coordinates))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
