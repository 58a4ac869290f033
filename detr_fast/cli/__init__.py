"""The `detr-fast` command; each file here is one of its commands.

Exit codes: 0 done; 1 the work failed; 2 a usage error; 130 and 143 after SIGINT and SIGTERM. Every failure is one line
on stderr. What a command needs is imported when it runs, so that `--help` and most usage errors come at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from detr_fast.cli import evaluate, explain, info, label, merge, synth, train
from detr_fast.cli.arguments import UsageError, WorkFailed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    # SIGINT too: scripts start their background jobs with it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    args = _parser().parse_args(argv)
    try:
        with _safe_path():
            args.run(args)
    except UsageError as error:
        return _fail(args.command, error, 2)
    except KeyboardInterrupt:
        return _fail(args.command, "interrupted", 128 + signal.SIGINT)
    except (WorkFailed, OSError, RuntimeError, MemoryError) as error:
        return _fail(args.command, error, 1)
    return 0


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keeps the Pythons that multiprocessing starts from importing from the current folder."""
    given = "PYTHONSAFEPATH" in os.environ
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        yield
    finally:
        if not given:
            del os.environ["PYTHONSAFEPATH"]


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(command: str, error: object, code: int) -> int:
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"detr-fast {command}: error: {reason}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="detr-fast", description="DETR: detection and panoptic segmentation.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in (
        ("label", label),
        ("merge", merge),
        ("synth", synth),
        ("eval", evaluate),
        ("train", train),
        ("explain", explain),
        ("info", info),
    ):
        added = commands.add_parser(name, allow_abbrev=False, help=command.HELP, description=command.DESCRIPTION)
        command.add_options(added)
        added.set_defaults(run=command.run)
    return parser
