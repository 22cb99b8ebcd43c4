"""mealfast's version: here, so that rooms can name it without the package that imports them."""

VERSION = "0.1.0"
