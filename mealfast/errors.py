"""The one exception that users see."""


class UsageError(ValueError):
    """A wrong option, file or combination: one line that names it and says what would be right (exit status 2)."""
