# SPDX-License-Identifier: Apache-2.0
"""Writing files: as a whole, or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['leftovers', 'replacing']


@contextmanager
def replacing(path: str | os.PathLike, like: str | os.PathLike | None = None) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` as a whole or, after an error, not at all.

    The temporary file lies beside `path`, under a name that no other process takes.

    Args:
        path: The file that is to be there in the end.
        like: A file whose permissions it is to have; those that any new file gets, unless given.

    Raises:
        OSError: The file cannot be written; one of that name stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        # Some writers, such as safetensors, give a file to its owner alone.
        if like is not None:
            shutil.copymode(like, temporary)
        else:
            os.umask(umask := os.umask(0))  # it can only be read by being set
            os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: str | os.PathLike) -> list[Path]:
    """The temporary files of `replacing` in a folder, whose writers are at work or were killed."""
    return [path for path in Path(folder).iterdir() if re.fullmatch(r'\..+\.\d+\.tmp', path.name)]
