# SPDX-License-Identifier: Apache-2.0
"""Logs and curves that cannot be written: a reason for every process to stop, in a sentence."""

import contextlib
import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object
from mmengine.runner import Runner

from .utils import RunError

__all__ = ['WatchfulRunner']

_OF_THE_DISK = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE}


class WatchfulRunner(Runner):
    """mmengine's Runner, which notes what its hooks cannot write, so that all its processes can stop together.

    Only the first process writes. If an exception stopped it alone, the others would wait for it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._failure: str | None = None
        super().__init__(*args, **kwargs)

    def last_checkpoint(self) -> str:
        """A note on the last checkpoint, for messages of errors."""
        raise NotImplementedError

    def test(self) -> dict[str, float]:
        metrics = super().test()
        if self._failure is not None:  # which takes nothing from the metrics
            self.logger.warning(self._failure)
        return metrics

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """As mmengine's; but a hook that cannot write does not keep the others from their work."""
        for hook in self._hooks:
            if hasattr(hook, fn_name):
                try:
                    getattr(hook, fn_name)(self, **kwargs)
                except TypeError as error:
                    raise TypeError(f'{error} in {hook}') from error
                except OSError as error:
                    self.note_failure(error)

    def note_failure(self, error: BaseException | None) -> None:
        """Note why something could not be written; FiniteLossHook stops the run for it."""
        if self._failure is None:
            gone = ' any more' if not Path(self.work_dir).is_dir() else ''
            self._failure = f'{self.work_dir} cannot be written to{gone}: {error}'

    @property
    def has_failed(self) -> bool:
        """Whether this process could not write something."""
        return self._failure is not None

    def check_failures(self) -> None:
        """Stop every process if one of them could not write.

        Raises:
            RunError: One could not.
        """
        for failure in all_gather_object(self._failure):
            if failure is not None:
                raise RunError(f'{failure}; {self.last_checkpoint()}.')

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note what other threads cannot write, and say in a sentence what else a disk refuses.

        Raises:
            RunError: A file could not be written.
        """
        before = threading.excepthook

        def note(args: threading.ExceptHookArgs) -> None:
            if isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith('tensorboard.'):
                self.note_failure(args.exc_value)  # of which Python would print a traceback
            else:
                before(args)

        threading.excepthook = note
        try:
            yield
        except OSError as error:
            if error.errno not in _OF_THE_DISK:
                raise
            raise RunError(f'a file cannot be written: {error}; {self.last_checkpoint()}.') from error
        finally:
            threading.excepthook = before
