# SPDX-License-Identifier: Apache-2.0
"""How every room writes a file: as a whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['replacing']


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` as a whole or, after an error, not at all.

    The temporary file lies beside `path`, under a name that no other process takes; it has the permissions that any
    new file gets, whatever its writer gave it.

    Args:
        path: The file that is to be there in the end.

    Raises:
        OSError: The file cannot be written; one of that name stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.umask(umask := os.umask(0))  # which can only be read by being set
        os.chmod(temporary, 0o666 & ~umask)  # safetensors writes for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
