"""Image trees, planned views and the loaders that decode them."""

from .batch import Batch, DataError, Loader
from .create import eval_loader, train_loader
from .index import ImageIndex
from .packing import pack
from .replay import ReplayLoader
from .views import EvalViews, ViewPlan

__all__ = [
    "Batch",
    "DataError",
    "EvalViews",
    "ImageIndex",
    "Loader",
    "ReplayLoader",
    "ViewPlan",
    "eval_loader",
    "pack",
    "train_loader",
]
