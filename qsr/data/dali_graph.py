"""The DALI pipelines: from file names and random draws to normalised images.

Nothing here draws random numbers: the pipelines receive the arrays of `transforms.draw`. DALI
decodes colour and grey JPEGs, with the same result as Pillow. `decoding` decodes everything else,
so that both loaders read the same image from a file.
"""

# DALI creates its operators and types at import; its stubs do not list them all.
# mypy: disable-error-code="attr-defined, no-any-return, no-untyped-call, untyped-decorator"

from functools import partial
from typing import Any, Literal

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image

from qsr.data.crew import Crew
from qsr.data.decoding import as_ppm
from qsr.data.resize import Resizer
from qsr.data.transforms import CROP_ATTEMPTS, EvalTransform, TrainTransform

Decode = Literal["cpu", "gpu"]

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pillow rejects larger images."""


@pipeline_def(enable_conditionals=True)
def train_pipeline(
    transform: TrainTransform, resizer: Resizer | None, decode: Decode, crew: Crew
) -> Any:
    """Outputs images [3, size, size] and labels []. Inputs are `paths`, `labels` and the fields of
    `TrainDraws` and `RandAugmentDraws`. Without a `resizer`, everything after the decoder runs on
    the GPU, and with RandAugment the images are uint8 [size, size, 3]: the caller augments and
    normalises them. `resizer` and `crew` must outlive the pipeline."""
    gpu = resizer is None
    encoded, shape = as_decoded_alike(read_files(), crew)
    box = crop_box(transform, shape)
    images = decode_box(encoded, box, decode)
    flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
    if transform.randaugment is not None and resizer is not None:
        images = _with_python(resizer.augmented, images, flips, *_randaugment_draws())
        return _normalise(images, transform), _labels(gpu)
    if resizer is None:
        images = _resize_on_gpu(images.gpu(), transform.size)
    else:
        images = _with_python(resizer.whole, images)
    if transform.randaugment is not None:  # the caller does the rest
        return fn.flip(images, horizontal=flips), _labels(gpu)
    return _normalise(images, transform, mirror=flips), _labels(gpu)


@pipeline_def(enable_conditionals=True)
def eval_pipeline(
    transform: EvalTransform, resizer: Resizer | None, decode: Decode, crew: Crew
) -> Any:
    """Outputs images [3, size, size] and labels []; inputs are `paths` and `labels`. `resizer` and
    `crew` as in `train_pipeline`."""
    gpu = resizer is None
    encoded, shape = as_decoded_alike(read_files(), crew)
    # torchvision's Resize: int(resize * long / short) for the long side, in integers.
    resized = transform.resize * shape[0:2] // fn.reductions.min(shape[0:2])
    # torchvision's CenterCrop: Python's round, which rounds halves to even.
    margin = resized - transform.size
    corner = margin // 2 + (margin & 1) * (margin // 2 & 1)
    images = _decode(encoded, decode)
    if resizer is None:
        # only the crop of the resized image is computed
        scale = fn.cast(shape[0:2], dtype=types.FLOAT) / fn.cast(resized, dtype=types.FLOAT)
        start, end = corner * scale, (corner + transform.size) * scale
        images = _resize_on_gpu(images.gpu(), transform.size, roi_start=start, roi_end=end)
    else:
        images = _with_python(resizer.cut, images, resized, corner)
    return _normalise(images, transform), _labels(gpu)


def read_files() -> DataNode:
    paths = fn.external_source(name="paths", dtype=types.UINT8, ndim=1)
    # With mmap, a file that is truncated while it is read would kill the process.
    return fn.io.file.read(paths, dont_use_mmap=True)


def as_decoded_alike(encoded: DataNode, crew: Crew) -> tuple[DataNode, DataNode]:
    """The files' contents, and the shape of each image (height, width, channels). Files that DALI
    would decode differently from Pillow are converted to PPM."""
    # with these two conditions ordinary JPEGs are neither copied nor passed to Python
    if (encoded[0] != 0xFF) | (encoded[1] != 0xD8):
        encoded = _by_pillow(encoded, crew)
    # ANY_DATA: a CMYK image then has four channels
    shape = fn.peek_image_shape(encoded, adjust_orientation=False, image_type=types.ANY_DATA)
    if (shape[2] == 4) | (shape[0] * shape[1] > MAX_PIXELS):
        encoded = _by_pillow(encoded, crew)
    return encoded, shape


def decode_box(encoded: DataNode, box: DataNode, decode: Decode) -> Any:
    """The pixels of a box [top, left, height, width].

    On the GPU the whole image is decoded first: nvImageCodec 0.9 leaves boxes to the CPU where
    nvJPEG is older than 13.2, and with later ones it fails on ordinary boxes (its issue 55)."""
    start, shape = box[0:2], box[2:4]
    if decode == "gpu":
        return fn.slice(_decode(encoded, decode), start=start, shape=shape, axes=(0, 1))
    return fn.decoders.image_slice(
        encoded, start=start, shape=shape, axes=(0, 1), adjust_orientation=False
    )


def _decode(encoded: DataNode, decode: Decode) -> Any:
    return fn.decoders.image(
        encoded,
        device="mixed" if decode == "gpu" else "cpu",
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as CPU decoders do
    )


def _by_pillow(encoded: DataNode, crew: Crew) -> Any:
    return fn.python_function(encoded, function=partial(crew.each, as_ppm), batch_processing=True)


def _labels(gpu: bool) -> DataNode:
    labels = fn.external_source(name="labels", dtype=types.INT64, ndim=0)
    return labels.gpu() if gpu else labels


def _randaugment_draws() -> tuple[DataNode, ...]:
    return (
        fn.external_source(name="ops", dtype=types.INT32, ndim=1),
        fn.external_source(name="values", dtype=types.FLOAT64, ndim=1),
        fn.external_source(name="filters", dtype=types.INT32, ndim=1),
    )


def _resize_on_gpu(images: DataNode, side: int, **region: Any) -> Any:
    return fn.resize(
        images, size=(side, side), interp_type=types.INTERP_LINEAR, antialias=True, **region
    )


def _with_python(function: Any, *inputs: DataNode) -> Any:
    # `function` must be defined outside the pipeline: DALI rewrites functions defined inside one,
    # and everything that they call
    return fn.python_function(
        *inputs, function=function, batch_processing=True, output_layouts="HWC"
    )


def crop_box(transform: TrainTransform, shape: DataNode) -> DataNode:
    """`transforms.crop_box` [4], operation by operation, for the shapes in the file headers."""
    # float64 throughout, as in numpy: float32 would round some windows to other pixels.
    shape = fn.cast(shape, dtype=types.FLOAT64)
    height, width = shape[0], shape[1]
    windows = fn.external_source(name="windows", dtype=types.FLOAT64, ndim=2)
    side = math.sqrt(height * width)
    heights = math.floor(side * windows[:, 0] + 0.5)
    widths = math.floor(side * windows[:, 1] + 0.5)
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    attempts = types.Constant(np.arange(CROP_ATTEMPTS, dtype=np.int32))
    first = fn.reductions.min(attempts + CROP_ATTEMPTS * (fits ^ True))
    if first < CROP_ATTEMPTS:
        crop_height = heights[first]
        crop_width = widths[first]
        top = math.floor(windows[first, 2] * (height - crop_height + 1))
        left = math.floor(windows[first, 3] * (width - crop_width + 1))
    else:
        min_aspect = types.Constant(np.float64(transform.augmentation.min_aspect))
        max_aspect = types.Constant(np.float64(transform.augmentation.max_aspect))
        crop_height = math.clamp(math.floor(width / min_aspect + 0.5), 1, height)
        crop_width = math.clamp(math.floor(height * max_aspect + 0.5), 1, width)
        top = math.floor((height - crop_height) / 2)
        left = math.floor((width - crop_width) / 2)
    box = fn.stack(top, left, crop_height, crop_width)
    return fn.cast(box, dtype=types.INT32)


def _normalise(
    images: DataNode, transform: TrainTransform | EvalTransform, mirror: DataNode | int = 0
) -> DataNode:
    """float32, channels first. DALI expects mean and standard deviation on the pixels' scale."""
    return fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in transform.mean],
        std=[255 * value for value in transform.std],
    )
