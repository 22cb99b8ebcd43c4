"""Image trees, planned views and the loaders that decode them.

    index = ImageIndex.scan("imagenet/train")
    plan = ViewPlan(index.widths, index.heights, seed=0, size=224)
    for batch in train_loader("dali", index, plan, batch_size=512, stop_step=10_000, device="cuda"):
        batch.images  # uint8 [512, 224, 224, 3]

`index` knows the files, `views` decides what is cut out of them, `steps` deals that to ranks, and `pillow` or `dali`
decodes it.
"""

from .batch import Batch, DataError, Loader
from .create import eval_loader, label_loader, train_loader
from .explicit_views import ExplicitViews
from .index import ImageIndex
from .label_cache import LabelCache
from .label_header import EXPLICIT, CacheHeader, plan_fields, read_header
from .label_writer import Claim, LabelWriter, claim_label_cache, holds_label_cache
from .packing import pack
from .replay import ReplayLoader
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
    "ReplayLoader",
    "ViewPlan",
    "claim_label_cache",
    "eval_loader",
    "holds_label_cache",
    "label_loader",
    "pack",
    "plan_fields",
    "read_header",
    "train_loader",
]
