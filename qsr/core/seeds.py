"""Named random streams.

Every random choice of a run is drawn from a seed with a name, for example
`seed_for(1, "augment", worker=3, step=7)`. No generator runs on from step to step, so a run that
resumes at step 7 draws what the uninterrupted run drew there, and a worker draws the same numbers
whether it has a process of its own or shares one.
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
