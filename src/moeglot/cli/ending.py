"""How a command ends that does not reach its end: our refusals, the system's and Ctrl-C, each as three lines or JSON, and an exit status."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from moeglot.cli.options import print_json
from moeglot.errors import MoeglotError

CANNOT_TELL, INTERRUPTED = 2, 130
RESUMABLE = ("convert", "merge", "tune")
"""The commands that have --resume."""
PERMISSIONS = "check who may read and write it, and pass another path or change that"
SPACE = "free space there or raise the limit, or choose another place"
OTHER_KIND = "check the path, and what lies there"
ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), PERMISSIONS),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), SPACE),
    **dict.fromkeys((errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG), OTHER_KIND),
}
"""The system's number of an error -> what to do."""


@contextmanager
def told() -> Iterator[None]:
    """Whatever ends the block is told to the user; what has an exit status ends the process."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names and signs that the terminal's encoding lacks
    try:
        try:
            yield
        finally:
            _flush()
    except MoeglotError as error:
        _tell(type(error).__name__, error)
        sys.exit(error.exit_status)
    except BrokenPipeError:  # nobody reads on, as in `| head`
        sys.exit(CANNOT_TELL)
    except OSError as error:
        _tell(type(error).__name__, _of_system(error))
        sys.exit(CANNOT_TELL)
    except KeyboardInterrupt:
        _tell_interrupted()
    except SystemExit as ended:
        if _comes_of(ended, KeyboardInterrupt):  # typer makes an exit of it
            _tell_interrupted()
        if _comes_of(ended, BrokenPipeError):
            sys.exit(CANNOT_TELL)
        raise


def _flush() -> None:
    """What is still in memory may meet a full disk, too; after that, nothing is tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _tell(name: str, error: MoeglotError) -> None:
    if "--json" in sys.argv:
        said = {"schema": "moeglot/error/1", "error": name, "wrong": error.wrong, "known": error.known, "do": error.do}
        try:
            print_json({**said, "exit_status": error.exit_status})
            _flush()
            return
        except OSError:  # what could not be written to may be standard output itself
            pass
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"[bold red]{name}[/]: ", end="")
    console.print(str(error), markup=False, highlight=False)


def _of_system(error: OSError) -> MoeglotError:
    """The system's error in our three lines; libraries, too, raise some that have only words."""
    path = " and ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes)))
    words = error.strerror or next(iter(str(error).strip().split("\n")), "") or type(error).__name__
    return MoeglotError(f"{path or 'a file'} could not be read or written", f"the system says: {words}", ADVICE.get(error.errno or 0, OTHER_KIND))


def _comes_of(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


def _tell_interrupted() -> None:
    resumable = sys.argv[1:2] and sys.argv[1] in RESUMABLE and "--dry-run" not in sys.argv
    again = "the same command" if any(word.partition("=")[0] == "--part" for word in sys.argv) else "the same command with --resume"
    print("interrupted" + (f"; {again} goes on with what was written" if resumable else ""), file=sys.stderr)
    sys.exit(INTERRUPTED)
