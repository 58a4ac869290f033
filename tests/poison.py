"""What kills the process that touches it. Apart, since that process imports it anew each time."""

from __future__ import annotations

import os
import signal
from pathlib import PosixPath


class Poison(PosixPath):
    """A folder with an image that kills who reads it."""

    def __fspath__(self) -> str:
        if self.name == "poison.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__fspath__()
