# SPDX-License-Identifier: Apache-2.0
"""Files: written as a whole or not at all; and how what they say is shown."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['leftovers', 'printable', 'reason', 'replacing', 'state_of']


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


def state_of(path: str | os.PathLike) -> str:
    """What a path is that is not what was needed, as the end of a sentence: 'does not exist', 'is a folder'."""
    path = Path(path)
    if path.is_dir():
        return 'is a folder'
    if path.is_file():
        return 'is a file'
    if path.is_symlink():
        return 'is a link to what does not exist'
    return 'is neither a file nor a folder' if path.exists() else 'does not exist'


def leftovers(folder: str | os.PathLike, owner: str) -> list[Path]:
    """The temporary files of `replacing` in a folder that one writer made, which is at work or was killed."""
    pattern = rf'\..+\.{re.escape(owner)}\.[0-9a-f]{{16}}\.tmp'
    return [path for path in Path(folder).iterdir() if re.fullmatch(pattern, path.name)]


def printable(text: str) -> str:
    """Text from a file, fit for a terminal or a log: control characters, which could command either, are spelt out."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def reason(error: Exception) -> str:
    """The text of an error that a reader of files raised, without PyTorch's advice to run what a file holds."""
    text = str(error)
    if 'weights_only' in text:
        return "the file holds what is not read without running it, and is refused; 'vssm convert' reads weights alone"
    return '\n'.join(map(printable, text.split('\n')))
