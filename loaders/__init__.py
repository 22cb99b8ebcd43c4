"""Image trees, planned views and the loaders that decode them."""

from .batch import Batch, DataError, Loader
from .index import ImageIndex
from .views import EvalViews, ViewPlan

__all__ = ["Batch", "DataError", "EvalViews", "ImageIndex", "Loader", "ViewPlan"]
