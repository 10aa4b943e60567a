"""A decorator for functions that stay outside of torch.compile's graphs."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_compiled_graphs(function: F) -> F:
    """Breaks the graph of a compiled caller at this function, for code in which a compiler would fuse nothing."""

    @functools.wraps(function)
    def wrapper(*args: Any, **settings: Any) -> Any:
        # Decide at the call and not at import: `disable` imports the compiler, which takes a second.
        inner: Any = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return inner(*args, **settings)

    result: Any = wrapper
    return result
