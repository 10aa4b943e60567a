"""What a compiled caller leaves to plain torch."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_compiled_graphs(function: F) -> F:
    """A compiled caller's graph breaks here: inside is nothing that a compiler would fuse."""

    @functools.wraps(function)
    def called(*args: Any, **settings: Any) -> Any:
        # Asked at the call, because `disable` imports the compiler, which takes a second.
        inner: Any = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return inner(*args, **settings)

    wrapped: Any = called
    return wrapped
