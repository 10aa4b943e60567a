"""The errors that a command turns into one message without a traceback."""


class UsageError(ValueError):
    """A mistake that the user can mend: the message says where, what was found, what was wanted, what to do."""


class NonFiniteError(ArithmeticError):
    """Loss or gradient is NaN or infinite: the run stopped before the optimiser moved."""


class RankError(UsageError):
    """A `UsageError` that only this rank has met; the others wait, so this rank must say it."""


class EchoedError(UsageError):
    """An error of the first rank, raised on the others so that all stop; the first has said it."""


def visible(text: str) -> str:
    """Escape whatever does not print, so that text of others neither moves a cursor nor turns its direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
