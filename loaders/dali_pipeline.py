"""The DALI pipeline: paths, boxes and flips in, uint8 HWC views out; JPEGs are read and decoded by DALI alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline

INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class GpuDecoding:
    """Settings of the JPEG decoder on a GPU; benchmarks/loaders.py --sweep measures them.

    Defaults are DALI's, but for the chroma. Hints and paddings take memory once and for all instead of in steps as
    larger images come: MLPerf's for ImageNet are 5980 x 6430 pixels, 211025920 and 140544512 bytes.
    """

    hardware_share: float = 0.65  # of the images, for the hardware decoder, where the GPU has one
    fancy_upsampling: bool = True  # chroma interpolated as libjpeg-turbo does, hence as Pillow sees it
    width_hint: int = 0  # pixels
    height_hint: int = 0
    device_padding: int = 16777216  # bytes a thread
    host_padding: int = 8388608


def build_pipeline(
    *,
    rows: int,
    size: int,
    windowed: bool,
    interpolation: str,
    resize: bool,
    packed: bool,
    device_index: int | None,
    threads: int,
    prefetch: int,
    decoding: GpuDecoding,
) -> Pipeline:
    """A pipeline of batches of up to `rows` views, on GPU `device_index` or, where it is None, on the CPU.

    Inputs to feed: "paths" uint8 [L] each, or, if `packed`, files as "encoded" uint8 [L] each, to be kept alive and
    unchanged until their batch is out; "starts" and "shapes" int32 [2] each (x, y and width, height of the box),
    "flips" int32 each; if `resize` and `windowed` also "resized" float32 [2] and "offsets" int32 [2] each (x, y).
    Outputs: views uint8 [size, size, 3] each, or, without `resize`, uint8 [height, width, 3] each; and the files'
    sizes in bytes, int64 [1] each, on the CPU.
    """
    pipe = Pipeline(
        batch_size=rows, num_threads=threads, device_id=device_index, prefetch_queue_depth=prefetch, exec_dynamic=True
    )
    with pipe:
        if packed:
            # No copy: DALI's threads read the bytes where they lie.
            encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, no_copy=True)
        else:
            encoded = fn.io.file.read(_input("paths", 1, types.UINT8))
        gpu = device_index is not None
        tuning: dict[str, Any] = {
            "device": "mixed",
            "hw_decoder_load": decoding.hardware_share,
            "preallocate_width_hint": decoding.width_hint,
            "preallocate_height_hint": decoding.height_hint,
            "device_memory_padding": decoding.device_padding,
            "host_memory_padding": decoding.host_padding,
            "jpeg_fancy_upsampling": decoding.fancy_upsampling,
        }
        images = fn.decoders.image_slice(
            encoded,
            start=_input("starts", 1, types.INT32),
            shape=_input("shapes", 1, types.INT32),
            axis_names="WH",
            output_type=types.RGB,
            adjust_orientation=False,  # Pillow and torchvision do not turn images by their EXIF tag either
            **(tuning if gpu else {}),
        )
        if resize:
            images = _resize(images, size, windowed, interpolation)
        images = fn.flip(images, horizontal=_input("flips", 0, types.INT32))
        pipe.set_outputs(images, encoded.shape(dtype=types.INT64))
    pipe.build()
    return pipe


def _resize(images: Any, size: int, windowed: bool, interpolation: str) -> Any:
    # antialias: without it DALI's pixels are 1.5 of 255 off Pillow's, which costs about 1% of top-1.
    how = {"interp_type": INTERPOLATION[interpolation], "antialias": True}
    if not windowed:
        return fn.resize(images, resize_x=size, resize_y=size, **how)
    resized = _input("resized", 1, types.FLOAT)
    return fn.slice(
        fn.resize(images, resize_x=resized[0], resize_y=resized[1], **how),
        start=_input("offsets", 1, types.INT32),
        shape=[size, size],
        axis_names="WH",
        out_of_bounds_policy="pad",
        fill_values=0,
    )


def _input(name: str, ndim: int, dtype: Any) -> Any:
    return fn.external_source(name=name, ndim=ndim, dtype=dtype)
