"""What ``module:name`` on the command line stands for: a network, or the data."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offramp.build.batch import as_call
from offramp.build.watch import as_found
from offramp.errors import DataError, OfframpError, near_matches

__all__ = ["backbone_of", "loader_of", "running_on"]


def backbone_of(name: str, shape: str | None = None) -> tuple[nn.Module, Any]:
    """The network that ``module:factory`` makes, and an example batch for it.

    The factory takes no arguments and returns the network, or the network and an example.

    Args:
        name: ``module:factory``; modules of the current folder are found.
        shape: of one float32 sample, as ``3x32x32``; instead of the factory's example.

    Raises:
        DataError: it cannot be imported, makes something else, there is no example, or the network
            fails on it.
    """
    made = _call(name)
    backbone, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(backbone, nn.Module):
        raise DataError(
            f"{name!r} made a {type(backbone).__name__}. Expected a torch.nn.Module, or a tuple of "
            "one and an example batch."
        )
    if shape is not None:
        example = _example(shape)
    if example is None:
        raise DataError(
            f"{name!r} gave no example. Let it return (network, example batch of two or more "
            "samples), or give the shape of one sample: --shape 3x32x32."
        )
    # It may write to its inputs, and the example is not done with.
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, as_call(example))
    kwargs.pop("labels", None)  # as attach does
    what = f"the example of {name!r}" if shape is None else f"samples of --shape {shape}"
    with as_found(backbone), running_on(what):
        backbone(*args, **kwargs)
    return backbone, example


@contextmanager
def running_on(what: str) -> Iterator[None]:
    """Tell what a network runs on where that does not fit it.

    Args:
        what: in words, with the name or the option that it came by.

    Raises:
        DataError: in place of what torch raises on inputs of other shapes, types or number.
    """
    try:
        yield
    except (OfframpError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"Reading or running {what} fails with {type(error).__name__}: {error}. Expected "
            "inputs as its forward takes them; call it on one batch in Python to see where."
        ) from error


def loader_of(name: str) -> Iterable[Any]:
    """The loader that ``module:factory`` makes.

    Raises:
        DataError: it cannot be imported, or cannot be walked.
    """
    made = _call(name)
    if not isinstance(made, Iterable):
        raise DataError(
            f"{name!r} made a {type(made).__name__}. Expected a loader: something that can be "
            "walked and yields (input, labels) batches."
        )
    return made


def _call(name: str) -> Any:  # noqa: ANN401
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise DataError(f"{name!r} is not of the form module:factory, such as mynets:resnet.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        raise DataError(
            f"{name!r}: {error}. Modules are looked for in the current folder and among those "
            "that are installed."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = near_matches(attribute, [n for n in dir(module) if callable(getattr(module, n))])
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"The module {module_name!r} has no function {attribute!r}.{hint}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise DataError(
            f"{name!r} cannot be called without arguments: {error}. Name a function that takes "
            "none, and calls it with them."
        ) from error
    return factory()


def _example(shape: str) -> torch.Tensor:
    try:
        sizes = [int(size) for size in shape.lower().split("x")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise DataError(f"--shape {shape!r} is not of the form 3x32x32, the sizes of one sample.")
    return torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0))
