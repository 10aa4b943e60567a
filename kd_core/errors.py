"""Errors that a command turns into one message without a traceback."""


class UsageError(ValueError):
    """A mistake that the user can mend. Its message has the place, what was found, what was wanted, and what to do."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite. The run stops before the optimiser changes anything."""


class RankError(UsageError):
    """A `UsageError` that only this rank has met. The other ranks wait, so this rank must report it."""


class RemoteError(UsageError):
    """An error of the first rank, raised on the others so that all stop. The first rank reports it."""


def escape_unprintable(text: str) -> str:
    """Escapes unprintable characters, so that untrusted text neither moves the cursor nor changes writing direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
