"""What kills the process that touches it. Apart, since that process imports it anew each time."""

from __future__ import annotations

import os
import signal
from pathlib import PosixPath
from typing import Any

from detr_fast.detr.segmentation import DETRsegm


class Poison(PosixPath):
    """A folder with an image that kills who reads it."""

    def __fspath__(self) -> str:
        if self.name == "poison.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__fspath__()


class DiesOnce(DETRsegm):
    """A model whose process is killed by its second batch, once; `mark` is a file that says that it was."""

    mark: str
    batches = 0

    def forward(self, samples: Any, *arguments: Any, **options: Any) -> Any:
        self.batches += 1
        if self.batches == 2 and not os.path.exists(self.mark):
            open(self.mark, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(samples, *arguments, **options)


class DiesOverWhite(DETRsegm):
    """A model whose process is killed by a white image."""

    def forward(self, samples: Any, *arguments: Any, **options: Any) -> Any:
        if (samples > 2).flatten(1).all(1).any():  # normalised
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(samples, *arguments, **options)
