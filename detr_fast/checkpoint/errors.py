"""The one error of this room, and the words of its messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

ACCEPTED = "a facebookresearch/detr .pth file, a transformers DETR folder, or a folder or file of detr_fast"


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message is one line with its name, the fault and, where that helps, the accepted
    kinds of files."""

    def __init__(self, message: str):
        super().__init__(message.replace("\n", " "))  # names of files and parameters may have some


def fail(source: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{source}: {problem}")


def listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(str(name)[:200] for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
