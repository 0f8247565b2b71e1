"""Errors that a user can mend, and the way they are shown."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """A mistake that the user can mend: the message says what is wrong, where, and what to do."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that does not exist, with the nearest known one.

    >>> unknown_name("key", "wieght", ["weight", "path"])
    "unknown key 'wieght'; did you mean 'weight'?"
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(names)}"
    return f"unknown {kind} '{name}'; {hint}"


def exit_with_message(error: Exception) -> NoReturn:
    """Print one message, without a traceback, and exit with status 2."""
    rank = os.environ.get("RANK", "0")
    print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr)
    sys.exit(2)


def run_command(command: Callable[[], object]) -> None:
    """Run a command-line program; a user's mistake or a failing disk ends in one message and exit status 2."""
    try:
        command()
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        exit_with_message(error)
    except KeyboardInterrupt:
        sys.exit(130)
