# SPDX-License-Identifier: Apache-2.0
"""Writing files: as a whole, or not at all."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['leftovers', 'replacing']


@contextmanager
def replacing(path: str | os.PathLike, like: str | os.PathLike | None = None, owner: str = '') -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` as a whole or, after an error, not at all.

    The temporary file lies beside `path`, under a name that no other writer takes.

    Args:
        path: The file that is to be there in the end.
        like: File whose permissions the new one gets; unless given, it gets those of any new file.
        owner: Name of the writer, of letters and digits, by which `leftovers` knows what it left.

    Raises:
        OSError: The file cannot be written; one of that name stays as it was.
    """
    path = Path(path)
    temporary = path.with_name('.'.join(['', path.name, *filter(None, [owner]), secrets.token_hex(8), 'tmp']))
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        # Some writers, such as safetensors, give a file to its owner alone.
        if like is not None:
            shutil.copymode(like, temporary)
        else:
            os.umask(umask := os.umask(0))  # the umask can only be read by setting it
            os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: str | os.PathLike, owner: str) -> list[Path]:
    """The temporary files of `replacing` in a folder that one writer made, which is at work or was killed."""
    pattern = rf'\..+\.{re.escape(owner)}\.[0-9a-f]{{16}}\.tmp'
    return [path for path in Path(folder).iterdir() if re.fullmatch(pattern, path.name)]
