"""Images per second of the loaders, on the same files in one run.

    python benchmarks/loaders.py [--data DIR] [--out FILE]

`bare-dali` is the ceiling: DALI's own file reader and random crop, nothing of mealfast. `torchvision` is the usual
ImageFolder with a DataLoader of as many workers as cores, ToTensor and Normalize included; `torchvision-uint8`, on
request, leaves these two to the model, as mealfast does. All yield batches of shuffled, mirrored random crops. They
take turns, round by round, so that a busy machine slows them alike; the median of the rounds is reported.
With a GPU, `--sweep` measures batch size, decoder share, threads and prefetch depth at 224 and 380 pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import tempfile
import time
from pathlib import Path

import numpy as np
import nvidia.dali
import torch
from _images import make_images
from _record import record, write

from mealfast.loaders import DataError, ImageIndex, ViewPlan, train_loader
from mealfast.loaders.cores import core_count

NAMES = ("bare-dali", "mealfast-dali", "mealfast-pillow", "torchvision")
CORES = core_count()


def main() -> None:
    args = parse()
    with contextlib.ExitStack() as stack:
        if args.data is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mealfast-benchmark-")))
            make_images(root, args.images)
        else:
            root = args.data
        try:
            index = ImageIndex.scan(root, cache_dir=stack.enter_context(tempfile.TemporaryDirectory()))
            settings = list(sweep(args) if args.sweep else [Setting(args)])
            for setting in settings:
                for row in measure(index, setting, args):
                    report(row, args.out)
        except DataError as error:
            raise SystemExit(f"benchmarks/loaders.py: {error}") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="tree of class folders (default: makes an ImageNet-like one)")
    parser.add_argument("--images", type=int, default=1500, help="how many images to make (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to which one JSON line a loader is appended")
    parser.add_argument("--names", nargs="+", choices=list(STREAMS), default=list(NAMES), help="which loaders")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=None, help="default: 64 on the CPU, 512 on a GPU")
    parser.add_argument("--threads", type=int, default=CORES, help="decoding threads or workers (default: the cores)")
    parser.add_argument("--prefetch", type=int, default=2, help="batches (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each loader (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="on a GPU: measure mealfast-dali over its settings")
    args = parser.parse_args()
    if args.sweep and args.device == "cpu":
        parser.error("--sweep: needs a GPU; leave it out on the CPU")
    if args.batch_size is None:
        args.batch_size = 64 if args.device == "cpu" else 512
    return args


class Setting:
    """What a measurement varies."""

    def __init__(self, args, names=None, **changes):
        self.names = names or args.names
        self.decoding = {}  # settings of the GPU's decoder that differ from the default
        for name in ("size", "batch_size", "threads", "prefetch"):
            setattr(self, name, getattr(args, name))
        for name, value in changes.items():
            setattr(self, name, value)


def sweep(args):
    """One setting changed at a time from the base, at both sizes of the recipes."""
    for size in (224, 380):
        base = Setting(args, size=size)
        yield base
        variants = {"batch_size": (64, 128, 256, 1024), "threads": (2, 4, 6, 8, 12, 16), "prefetch": (1, 3, 4, 5)}
        variants["decoding"] = [{"hardware_share": share} for share in (0.0, 0.5, 0.8, 0.9, 0.99)]
        variants["decoding"] += [{"fancy_upsampling": False}, {"width_hint": 5980, "height_hint": 6430}]
        variants["decoding"] += [{"device_padding": 211025920, "host_padding": 140544512}]
        for name, values in variants.items():
            for value in values:
                yield Setting(args, ["mealfast-dali"], size=size, **{name: value})


def measure(index, setting, args):
    """One row a loader: median and spread of images per second over the rounds."""
    streams = {name: STREAMS[name](index, setting, args) for name in setting.names}
    rates = {name: [] for name in streams}
    for stream in streams.values():
        for _ in range(3 * setting.prefetch):  # start workers, fill queues
            next(stream)
        turn(stream, setting, args.seconds / 3)
    for _ in range(args.rounds):
        for name, stream in streams.items():
            # What was made ready during the others' turns does not count.
            for _ in range(queued(name, setting)):
                next(stream)
            rates[name].append(turn(stream, setting, args.seconds))
    for stream in streams.values():
        stream.close()
    for name, values in rates.items():
        quartiles = np.percentile(values, [25, 50, 75])
        yield record(
            name,
            images_per_second=round(quartiles[1], 1),
            spread={"p25": round(quartiles[0], 1), "p75": round(quartiles[2], 1)},
            min=round(min(values), 1),
            max=round(max(values), 1),
            rounds=len(values),
            size=setting.size,
            batch_size=setting.batch_size,
            threads=setting.threads,
            prefetch=setting.prefetch,
            decoding=setting.decoding,
            device=args.device,
            **data_and_versions(index),
        )


def queued(name, setting):
    return setting.threads * 2 + 1 if name.startswith("torchvision") else setting.prefetch + 1


def turn(stream, setting, seconds):
    """Images per second over about `seconds`; on a GPU until the last batch is there."""
    images, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        images += len(next(stream))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    return images / elapsed


def data_and_versions(index):
    versions = {name: importlib.metadata.version(name) for name in ("pillow", "torchvision")}
    return {
        "images": len(index),
        "mean_pixels": [round(float(index.widths.mean())), round(float(index.heights.mean()))],
        "mean_bytes": round(float(index.file_sizes.mean())),
        "dali": nvidia.dali.__version__,
        **versions,
    }


def report(row, out):
    spread = f"{row['spread']['p25']:.0f} to {row['spread']['p75']:.0f}"
    print(
        f"{row['name']:16} {row['images_per_second']:9.1f} images/s  (quartiles {spread})  size {row['size']}, "
        f"batch {row['batch_size']}, threads {row['threads']}, prefetch {row['prefetch']}"
        + "".join(f", {name} {value}" for name, value in row["decoding"].items()),
        flush=True,
    )
    if out is not None:
        write(out, [row])


# --- the loaders: endless generators of uint8 image batches -----------------------------------------------------------


def bare_dali(index, setting, args):
    """DALI's file reader and random crop, as its examples write it, with the resize that training needs."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def
    from nvidia.dali.plugin.pytorch import feed_ndarray

    gpu = args.device != "cpu"

    @pipeline_def(exec_dynamic=True)
    def pipeline():
        files = [index.path(i) for i in range(len(index))]
        encoded, labels = fn.readers.file(
            files=files, labels=index.labels.tolist(), random_shuffle=True, initial_fill=1024, name="reader"
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
        )
        images = fn.resize(
            images, resize_x=setting.size, resize_y=setting.size, interp_type=types.INTERP_LINEAR, antialias=True
        )
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    pipe = pipeline(
        batch_size=setting.batch_size,
        num_threads=setting.threads,
        device_id=torch.cuda.current_device() if gpu else None,
        prefetch_queue_depth=setting.prefetch,
        seed=1,
    )
    pipe.build()
    stream = torch.cuda.current_stream() if gpu else None
    while True:
        images = pipe.run(stream)[0].as_tensor()
        batch = torch.empty(images.shape(), dtype=torch.uint8, device=args.device)
        yield feed_ndarray(images, batch, cuda_stream=stream)


def mealfast(backend):
    def stream(index, setting, args):
        plan = ViewPlan(index.widths, index.heights, seed=1, size=setting.size)
        options = {}
        if backend == "dali":
            from mealfast.loaders.dali_pipeline import GpuDecoding

            options["decoding"] = GpuDecoding(**setting.decoding)
        loader = train_loader(
            backend,
            index,
            plan,
            batch_size=setting.batch_size,
            stop_step=1 << 40,
            device=args.device,
            threads=setting.threads,
            prefetch=setting.prefetch,
            **options,
        )
        with contextlib.closing(loader):
            for batch in loader:
                yield batch.images

    return stream


def torchvision_folder(uint8):
    def stream(index, setting, args):
        from torch.utils.data import DataLoader, RandomSampler
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        crop = [transforms.RandomResizedCrop(setting.size), transforms.RandomHorizontalFlip()]
        normalised = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        views = transforms.Compose(crop + ([transforms.PILToTensor()] if uint8 else normalised))
        folder = ImageFolder(index.root, views)
        loader = DataLoader(
            folder,
            batch_size=setting.batch_size,
            # One epoch without end: at the end of a short one all workers stand still, which ImageNet's hardly do.
            sampler=RandomSampler(folder, replacement=True, num_samples=1 << 40),
            num_workers=setting.threads,
            persistent_workers=True,
            pin_memory=args.device != "cpu",
        )
        while True:
            for images, _ in loader:
                yield images.to(args.device, non_blocking=True)

    return stream


STREAMS = {
    "bare-dali": bare_dali,
    "mealfast-dali": mealfast("dali"),
    "mealfast-pillow": mealfast("pillow"),
    "torchvision": torchvision_folder(uint8=False),
    "torchvision-uint8": torchvision_folder(uint8=True),
}


if __name__ == "__main__":
    main()
