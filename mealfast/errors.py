"""The exceptions that users see, one line each."""


class UsageError(ValueError):
    """A wrong option, file or combination: one line that names it and says what would be right (exit status 2)."""


class RunError(RuntimeError):
    """What ended a run that was asked for rightly: one line that says what happened and what is left (status 1)."""
