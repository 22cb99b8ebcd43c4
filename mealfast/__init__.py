"""mealfast: distil an ensemble of pretrained image classifiers into a small one (MEAL V2), fast."""

__version__ = "0.1.0"
