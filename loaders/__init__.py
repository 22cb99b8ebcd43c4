"""Image trees, planned views and the loaders that decode them.

    index = ImageIndex.scan("imagenet/train")
    plan = ViewPlan(index.widths, index.heights, seed=0, size=224)
    loader = train_loader("dali", index, plan, batch_size=512, epochs=90, device="cuda")  # len(loader): steps in all
    for epoch, batches in loader.epochs():
        for batch in batches:
            batch.images  # uint8 [512, 224, 224, 3]
    loader.close()

`index` knows the files (`walk` lists them, `probe` looks into them, `index_store` keeps what was found), `views`
decides what is cut out of them, `steps` deals that to ranks, `prefetch` has batches made ahead, and `pillow` or `dali`
decodes them. `packed` reads and `packing` writes trees in few files; `label_*` and `explicit_views` are label caches.

Files that had other names: `broken_files` was `faults`, `pillow_render` was `render`, `prefetch` was `stream`; the
class `steps.BatchViews` was `Views`. `replay` is gone.
"""

from .batch import Batch, DataError, Loader
from .create import eval_loader, label_loader, train_loader
from .explicit_views import ExplicitViews
from .index import ImageIndex
from .label_cache import LabelCache
from .label_header import EXPLICIT, CacheHeader, plan_fields, read_header
from .label_writer import Claim, LabelWriter, claim_label_cache, holds_label_cache
from .packing import pack
from .prefetch import LoaderStopped, LoaderTimeoutError, PrefetchLoader, threads_are_blocked
from .views import EvalViews, ViewPlan

__all__ = [
    "EXPLICIT",
    "Batch",
    "CacheHeader",
    "Claim",
    "DataError",
    "EvalViews",
    "ExplicitViews",
    "ImageIndex",
    "LabelCache",
    "LabelWriter",
    "Loader",
    "LoaderStopped",
    "LoaderTimeoutError",
    "PrefetchLoader",
    "ViewPlan",
    "claim_label_cache",
    "eval_loader",
    "holds_label_cache",
    "label_loader",
    "pack",
    "plan_fields",
    "read_header",
    "threads_are_blocked",
    "train_loader",
]
