"""Decodes some images as a run does, in a process of its own; `decoder` reads what it logs.

Run as a script, and not imported by the rest: a GPU decoder that crashes must not take a run with
it, and without torch this takes two seconds.
"""

# DALI's stubs do not list all that it has.
# mypy: disable-error-code="attr-defined, no-untyped-call, untyped-decorator"

import sys
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def


@pipeline_def
def _decoding(decode: str) -> Any:
    encoded = fn.external_source(name="files", ndim=1)
    device = "mixed" if decode == "gpu" else "cpu"
    return fn.decoders.image(
        encoded, device=device, adjust_orientation=False, jpeg_fancy_upsampling=True
    )


def main(decode: str, device: str, *paths: str) -> None:
    """`decode`: cpu or gpu; `device`: index of the GPU."""
    files = [np.fromfile(path, dtype=np.uint8) for path in paths]
    device_id = int(device) if decode == "gpu" else None
    pipeline = _decoding(decode, batch_size=len(files), num_threads=1, device_id=device_id)
    pipeline.build()
    pipeline.feed_input("files", files)
    pipeline.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
