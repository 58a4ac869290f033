"""What labels on one machine and on many have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from detr_fast.labeling.interrupt import Interrupt
from detr_fast.labeling.manifest import Manifest
from detr_fast.labeling.stages import Reading, Writing

if TYPE_CHECKING:
    from detr_fast.predictor import Predictor


class Labeler:
    """A run: what labels, what is read and written and how, and where its progress goes."""

    def __init__(
        self,
        predictor: Predictor,
        images: Path,
        reading: Reading,
        writing: Writing,
        manifest: Manifest,
        interrupt: Interrupt,
        bar: tqdm[Any],
    ) -> None:
        self._predictor = predictor
        self._images = images
        self._reading = reading
        self._writing = writing
        self._manifest = manifest
        self._interrupt = interrupt
        self._bar = bar
        self._failed = 0
