# SPDX-License-Identifier: Apache-2.0
"""The run that a work dir is of: its identity, its checkpoints, and the lock that keeps a second run out."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .. import files
from .saved import numbered_checkpoints, read_notes
from .utils import RunError, replacing

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ['Run', 'current_run', 'lock', 'note_run', 'own_checkpoints', 'remove_leftovers']


class Run(NamedTuple):
    """A training from its beginning to its end, however often it is killed and resumed.

    Args:
        name: Random name, which the run's checkpoints note.
        parent: Checkpoint of another run from which this one went on; None where it began anew.
    """

    name: str
    parent: str | None = None

    @classmethod
    def new(cls, parent: Path | None = None) -> 'Run':
        return cls(secrets.token_hex(8), None if parent is None else str(parent.absolute()))


def current_run(work_dir: str | Path) -> Run | None:
    """The run that began last in a work dir; None where none is noted.

    Raises:
        RunError: The note cannot be read.
    """
    path = Path(work_dir, 'run.json')
    try:
        run = Run(**json.loads(path.read_text()))
        if not isinstance(run.name, str) or not isinstance(run.parent, str | None):
            raise ValueError(run)
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise RunError(
            f'{path} must name the current run of its folder: without this file, the last checkpoint of any run counts.'
        ) from error
    return run


def note_run(work_dir: str | Path, run: Run) -> None:
    """Make a run the current one of a work dir."""
    if current_run(work_dir) == run:
        return
    with replacing(Path(work_dir, 'run.json'), 'run') as temporary:
        temporary.write_text(json.dumps(run._asdict(), indent=2) + '\n')


def own_checkpoints(folder: str | Path, template: str, run: Run | None) -> Iterator[tuple[Path, str | None]]:
    """The checkpoints of a run in a folder that holds those of others too, the last one first.

    Args:
        folder: Where checkpoints are written.
        template: Name of their files, such as 'epoch_{}.pth'.
        run: The run; None for all checkpoints there are.

    Returns:
        The path of each, and why it cannot be read, None where it can: so much of it that nobody knows whose it is.
    """
    for path in reversed(numbered_checkpoints(folder, template)):
        try:
            if run is None or read_notes(path).get('run') == run.name:
                yield path, None
        except ValueError as error:
            yield path, str(error)
    if run is not None and run.parent is not None:
        yield Path(run.parent), None


def remove_leftovers(folder: str | Path, run: Run | None) -> None:
    """Remove what a run left in a folder if it was killed while it wrote. No other run may be at work there."""
    for owner in ('run', *([run.name] if run is not None else [])):
        for path in files.leftovers(folder, owner):
            path.unlink(missing_ok=True)


_locks: set[int] = set()  # file descriptors


def _leave_locks_to_the_parent() -> None:
    # A lock lasts as long as any process has the file open, and a worker outlives a run that is killed.
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


@contextmanager
def lock(work_dir: str | Path) -> Iterator[bool]:
    """Keep other runs out of a work dir, until the end of the context or of the process, even if it is killed.

    Returns:
        Whether the folder is locked: some systems and network folders have no locks.

    Raises:
        RunError: Another run has locked it.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(Path(work_dir, '.lock'), os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            raise RunError(
                f'{work_dir} is in use by another training: wait for its end, or name another folder by --work-dir.'
            ) from error
        except OSError:
            locked = False
        yield locked
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)
