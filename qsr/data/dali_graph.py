"""The DALI pipelines: from file names and drawn numbers to normalised images.

Nothing here draws random numbers: `transforms.draw` did, and the pipelines receive its arrays.
Images are read without regard to EXIF orientation, as ImageNet's are by every published recipe.
"""

# DALI makes its operators and types at import; its stubs do not know them all.
# mypy: disable-error-code="attr-defined, no-any-return, no-untyped-call, untyped-decorator"

from typing import Any, Literal

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.auto_aug.core import select
from nvidia.dali.data_node import DataNode

from qsr.data.resize import Resizer
from qsr.data.transforms import (
    CROP_ATTEMPTS,
    RANDAUGMENT_FILL,
    RANDAUGMENT_OPS,
    EvalTransform,
    TrainTransform,
)

Decode = Literal["cpu", "gpu"]


@pipeline_def(enable_conditionals=True)
def train_pipeline(transform: TrainTransform, resizer: Resizer | None, decode: Decode) -> Any:
    """Outputs images [3, size, size] and labels []; inputs are named as the fields of
    `TrainDraws`, with `paths` and `labels`. What follows the
    decoder happens on the GPU if there is no `resizer`, which otherwise must outlive the
    pipeline."""
    gpu = resizer is None
    encoded = read_files()
    box = crop_box(transform, encoded)
    images = fn.decoders.image_slice(
        encoded,
        device="mixed" if decode == "gpu" else "cpu",
        start=box[0:2],
        shape=box[2:4],
        axes=(0, 1),
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # on the GPU too, as CPU decoders do
    )
    if resizer is None:
        images = _resize_on_gpu(images.gpu(), transform.size)
    else:
        images = _with_python(resizer.whole, images)
    flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
    if transform.randaugment_depth == 0:
        return _normalise(images, transform, mirror=flips), _labels(gpu)
    images = _randaugment(fn.flip(images, horizontal=flips), transform)
    return _normalise(images, transform), _labels(gpu)


@pipeline_def
def eval_pipeline(transform: EvalTransform, resizer: Resizer | None, decode: Decode) -> Any:
    """Outputs images [3, size, size] and labels []; inputs are `paths` and `labels`. `resizer` as
    above."""
    gpu = resizer is None
    encoded = read_files()
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    # torchvision's Resize: int(resize * long / short) for the long side, in whole numbers.
    resized = transform.resize * shape[0:2] // fn.reductions.min(shape[0:2])
    # torchvision's CenterCrop: Python's round, which rounds halves to even.
    margin = resized - transform.size
    corner = margin // 2 + (margin & 1) * (margin // 2 & 1)
    images = fn.decoders.image(
        encoded,
        device="mixed" if decode == "gpu" else "cpu",
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    if resizer is None:
        # of the resized image nothing but the crop is computed
        scale = fn.cast(shape[0:2], dtype=types.FLOAT) / fn.cast(resized, dtype=types.FLOAT)
        start, end = corner * scale, (corner + transform.size) * scale
        images = _resize_on_gpu(images.gpu(), transform.size, roi_start=start, roi_end=end)
    else:
        images = _with_python(resizer.cut, images, resized, corner)
    return _normalise(images, transform), _labels(gpu)


def read_files() -> DataNode:
    paths = fn.external_source(name="paths", dtype=types.UINT8, ndim=1)
    # A mapped file that is cut short while it is read kills the process.
    return fn.io.file.read(paths, dont_use_mmap=True)


def _labels(gpu: bool) -> DataNode:
    return _to_device(fn.external_source(name="labels", dtype=types.INT64, ndim=0), gpu)


def _to_device(data: DataNode, gpu: bool) -> DataNode:
    return data.gpu() if gpu else data


def _resize_on_gpu(images: DataNode, side: int, **region: Any) -> Any:
    return fn.resize(
        images, size=(side, side), interp_type=types.INTERP_LINEAR, antialias=True, **region
    )


def _with_python(function: Any, *inputs: DataNode) -> Any:
    # given as it is: what is defined in a pipeline, DALI translates, with all that it calls
    return fn.python_function(
        *inputs, function=function, batch_processing=True, output_layouts="HWC"
    )


def crop_box(transform: TrainTransform, encoded: DataNode) -> DataNode:
    """`transforms.crop_box` [4], operation by operation, on the shapes in the files' headers."""
    # float64 throughout, as in numpy: float32 would round some windows to other pixels.
    shape = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False), dtype=types.FLOAT64)
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
        min_aspect = types.Constant(np.float64(transform.min_aspect))
        max_aspect = types.Constant(np.float64(transform.max_aspect))
        crop_height = math.clamp(math.floor(width / min_aspect + 0.5), 1, height)
        crop_width = math.clamp(math.floor(height * max_aspect + 0.5), 1, width)
        top = math.floor((height - crop_height) / 2)
        left = math.floor((width - crop_width) / 2)
    box = fn.stack(top, left, crop_height, crop_width)
    return fn.cast(box, dtype=types.INT32)


def _randaugment(images: DataNode, transform: TrainTransform) -> DataNode:
    """The drawn operations, one after the other, on uint8 images."""
    ops = fn.external_source(name="ops", dtype=types.INT32, ndim=1)
    values = fn.external_source(name="values", dtype=types.FLOAT, ndim=1)
    operations: Any = [_AUGMENTATIONS[name] for name in RANDAUGMENT_OPS]
    for k in range(transform.randaugment_depth):
        images = select(operations, ops[k], images, values[k])
    return images


# The operations; `value` is a number on the CPU, as in `TrainDraws.values`.


def _identity(images: DataNode, value: DataNode) -> DataNode:
    return images


def _shear_x(images: DataNode, value: DataNode) -> DataNode:
    return _warp(images, fn.transforms.shear(shear=fn.stack(value, 0.0)))


def _shear_y(images: DataNode, value: DataNode) -> DataNode:
    return _warp(images, fn.transforms.shear(shear=fn.stack(0.0, value)))


def _translate_x(images: DataNode, value: DataNode) -> DataNode:
    return _warp(images, fn.transforms.translation(offset=fn.stack(value, 0.0)))


def _translate_y(images: DataNode, value: DataNode) -> DataNode:
    return _warp(images, fn.transforms.translation(offset=fn.stack(0.0, value)))


def _warp(images: DataNode, matrix: DataNode) -> DataNode:
    return fn.warp_affine(
        images,
        matrix=matrix,
        inverse_map=False,
        fill_value=RANDAUGMENT_FILL,
        interp_type=types.INTERP_NN,  # linear takes three times as long on a CPU
    )


def _rotate(images: DataNode, value: DataNode) -> DataNode:
    return fn.rotate(
        images,
        angle=value,
        keep_size=True,
        fill_value=RANDAUGMENT_FILL,
        interp_type=types.INTERP_NN,
    )


def _brightness(images: DataNode, value: DataNode) -> DataNode:
    return fn.brightness(images, brightness=value)


def _contrast(images: DataNode, value: DataNode) -> DataNode:
    if images.device == "gpu":  # where the centre lies on the GPU, and cannot be an argument
        return augmentations.contrast.op(images, value.gpu())
    weights = types.Constant(np.array([0.299, 0.587, 0.114], dtype=np.float32))
    grey = fn.reductions.sum(fn.reductions.mean(images, axis_names="HW") * weights)
    return fn.contrast(images, contrast=value, contrast_center=grey)


def _color(images: DataNode, value: DataNode) -> DataNode:
    return fn.saturation(images, saturation=value)


def _sharpness(images: DataNode, value: DataNode) -> DataNode:
    # Pillow's blur: away from it by `value`, towards it below 1.
    blur = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
    centre = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=np.float32)
    kernel = types.Constant(blur) + value * types.Constant(centre - blur)
    return fn.filter(images, _to_device(kernel, images.device == "gpu"))


def _posterize(images: DataNode, value: DataNode) -> DataNode:
    mask = fn.cast(256 - math.pow(2, 8 - value), dtype=types.UINT8)
    return images & _to_device(mask, images.device == "gpu")


def _solarize(images: DataNode, value: DataNode) -> DataNode:
    threshold = _to_device(value, images.device == "gpu")
    return images ^ ((images >= threshold) * types.Constant(255, dtype=types.UINT8))


def _equalize(images: DataNode, value: DataNode) -> DataNode:
    return fn.equalize(images)


def _autocontrast(images: DataNode, value: DataNode) -> DataNode:
    return augmentations.auto_contrast.op(images, None)


_AUGMENTATIONS = {
    "identity": _identity,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "contrast": _contrast,
    "color": _color,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "equalize": _equalize,
    "autocontrast": _autocontrast,
}


def _normalise(
    images: DataNode, transform: TrainTransform | EvalTransform, mirror: DataNode | int = 0
) -> DataNode:
    """float32, channels first; DALI wants mean and deviation on the scale of the pixels."""
    return fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in transform.mean],
        std=[255 * value for value in transform.std],
    )
