"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replaced"]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside another, to write to: when the block ends, it takes the other's place.

    Where the block or the disk fails, nothing of it is left, and what stood there still does. Its
    name is its own, so that several writers do not meet in it: the last to end has written. Whoever
    may read other new files of that folder may read it.

    Args:
        path: what is written or replaced; its folder is made where there is none.

    Yields:
        A path in the same folder, where nothing is yet.

    Raises:
        IsADirectoryError: a folder stands there.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name may have 255 bytes, and these are enough to know it by.
    part = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:8]}.part")
    try:
        mode = _mode_of_new(part)
        yield part
        if stat.S_IMODE(part.stat().st_mode) != mode:
            part.chmod(mode)  # some writers keep what they write to its owner
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _mode_of_new(path: Path) -> int:
    """The permissions that a file of that name gets here; where nothing is yet, nothing is after.

    Asked of the folder: to read the process's mask is to set it, for other threads too.
    """
    path.touch(exist_ok=False)
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode
