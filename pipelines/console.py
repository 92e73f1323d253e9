"""What a person sees: errors in one sentence, and progress."""

import difflib
import errno
import io
import os
import re
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, SupportsFloat, TextIO

from tqdm import tqdm


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def first_process() -> bool:
    """Whether this is the process that prints and writes, of those that torchrun started; else there is but one."""
    return not under_torchrun() or os.environ["RANK"] == "0"


DEVICES = ("auto", "cpu", "cuda", "mps")
"""What --device takes."""
SPEAKING_SECONDS = 5.0
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
UNREAD = (errno.EPIPE, errno.EIO)  # the reader of a pipe has ended; the terminal is gone
OF_MEMORY = ": smaller batches, fewer or smaller images, or a narrower network need less. Nothing that was finished is lost."
SIGPIPE = getattr(signal, "SIGPIPE", 13)
PATH = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


class UserError(ValueError):
    """A mistake that the user can mend; its message says how. Ends a command with exit code 2 and no traceback."""


class NotThere(UserError):
    """The data are not where they were looked for. what: the message; remedy: its end, which names an option of train_all."""

    def __init__(self, what: str, remedy: str = ""):
        super().__init__(what + remedy)
        self.what = what


class Stopped(Exception):
    """A signal ended the work in good order; its message says where. Ends a command with exit code 128 + the signal."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class Signals:
    """While entered, the first SIGTERM, SIGINT, SIGUSR1 (a cluster's warning) or SIGHUP (a closed terminal) is only noted.

    So is that nobody reads the output any more (SIGPIPE). A second one acts as ever. What is ignored, as under nohup, stays so.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # the last two are not everywhere
    NOTED = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
    entered: ClassVar["Signals | None"] = None

    def __enter__(self) -> "Signals":
        self.received: int | None = None
        self.before = {}
        Signals.entered = self
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            heeded = [number for number in self.NOTED if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self.note) for number in heeded}
        return self

    def note(self, number: int, frame: object) -> None:
        self.received = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        Signals.entered = None
        for number, handler in self.before.items():
            signal.signal(number, handler)


def nearest(name: str, known: Iterable[str]) -> str:
    """`- did you mean 'x'?` for a misspelt name, and the names there are."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" - did you mean {close[0]!r}?" if close else "."
    return f"{hint} There are: {', '.join(known)}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 image` or `3 images`; many: the plural, where it is not `one` and an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def first_line(error: Exception) -> str:
    """The first line of a library's message, to be quoted in one of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def check_least(asked: object, group: str = "", /, **least: int) -> None:
    """Raises UserError where a setting, by its name, is below the least that makes sense; one that is None is not given.

    asked: the settings of a command; or those of a group of options, such as `metrics.`.
    """
    for name, bound in least.items():
        value = getattr(asked, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < bound:
                raise UserError(f"--{group}{name.replace('_', '-')} is a number from {bound} up, not {number}")


def check_seed(seed: int) -> None:
    """Raises UserError for one that torch's generators do not take."""
    if abs(seed) >= 2**62:
        raise UserError(f"--seed is a number below 2**62, not {seed}")


def run_command(main: Callable[[], None]) -> None:
    """Run an entry point; a user's mistake, a full disk or a bad path is one sentence and exit code 2, a signal 128 + it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_output()
    try:
        main()
    except UserError as error:
        sys.exit(fail(str(error)))
    except BrokenPipeError:  # of a print
        unread(sys.stdout)
        sys.exit(128 + SIGPIPE)
    except OSError as error:
        if error.errno not in DISK + PATH:
            raise
        remedy = "make room or permission and run the same command again" if error.errno in DISK else "give another path"
        where = error.filename2 or error.filename or "while writing"  # of a renaming, where to
        sys.exit(fail(f"{error.strerror}: {where}. Nothing that was finished is lost; {remedy}."))
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error))):
            raise
        sys.exit(fail(f"out of memory{OF_MEMORY}"))
    except Stopped as stopped:
        last_words("", str(stopped))
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        last_words("", "interrupted; nothing that was finished is lost, and the same command does the rest")
        sys.exit(130)


def fail(message: str) -> int:
    last_words(f"error: {message}")
    return 2


def last_words(*lines: str) -> None:
    """Before a process ends: printed once a machine, since a missing folder or device can be a matter of one."""
    if not under_torchrun() or os.environ["LOCAL_RANK"] == "0":
        try:
            print(*map(escaped, lines), sep="\n", file=sys.stderr, flush=True)
        except OSError:
            unread(sys.stderr)
    else:
        time.sleep(SPEAKING_SECONDS)  # torchrun ends all processes as soon as one ends: not this one first


def escaped(message: str) -> str:
    """A line with its control characters, line breaks and marks of the direction of writing shown as \\x1b, \\n or \\u202e, so
    that no name in it can move the cursor or begin a new line."""
    kept = "\t\u200c\u200d"  # the last two join letters, and parts of emoji
    return "".join(c if c.isprintable() or c in kept or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in message)


def prepare_output() -> None:
    """A stream that is closed is one that nobody reads; what a terminal cannot show is shown as a question mark."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def unread(stream: TextIO) -> None:
    """Nobody reads a stream any more: what else is written to it goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def say(*lines: str) -> None:
    """Print lines; a newline within one of them is part of a name, and is shown as \\n.

    Raises Stopped where nobody reads it any more; a training goes on to its next checkpoint first.
    """
    if not first_process():
        return
    try:
        tqdm.write("\n".join(map(escaped, lines)), file=sys.stdout)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in UNREAD:
            raise
        unread(sys.stdout)
        if Signals.entered is None:
            raise Stopped("nobody reads the output any more; the same command does the rest", SIGPIPE) from error
        Signals.entered.note(SIGPIPE, None)


class Progress:
    """A bar on a terminal; elsewhere about LINES lines; nothing without a label.

    The values passed to `update` are shown behind the bar. They are read (fetched from a device) only when they are shown.
    """

    LINES = 10  # at most about so many lines where the output is no terminal
    SECONDS = 5.0  # at least between two of them

    def __init__(self, label: str | None, total: int, unit: str, done: int = 0):
        self.silent = label is None or not first_process()
        self.label, self.total, self.unit, self.done, self.first = label, total, unit, done, done
        self.shown = time.monotonic()
        self.timed: tuple[float, int] | None = None
        """When the first update came, and what was done then. The time before it may be that of compiling."""
        self.next_line = done + 1  # the first line comes after SECONDS, however long the work takes
        self.bar = None
        if sys.stderr.isatty() and not self.silent:
            self.bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def update(self, count: int, values: Mapping[str, SupportsFloat] | None = None) -> None:
        self.done += count
        now = time.monotonic()
        self.timed = self.timed or (now, self.done)
        if self.bar is not None:
            if values and now - self.shown > 0.5:
                self.bar.set_postfix_str(formatted(values), refresh=False)
                self.shown = now
            self.bar.update(count)
        elif not self.silent and self.done >= self.next_line and now - self.shown > self.SECONDS:
            self.line(now, values or {})
            tenth = max(1, (self.total - self.first) // self.LINES)
            self.next_line = self.first + ((self.done - self.first) // tenth + 1) * tenth
            self.shown = now

    def line(self, now: float, values: Mapping[str, SupportsFloat]) -> None:
        assert self.timed is not None
        began, first = self.timed
        speed = ""
        if self.done > first and now > began:
            rate = (self.done - first) / (now - began)
            speed = f", {rate:.1f} {self.unit}/s, {tqdm.format_interval((self.total - self.done) / rate)} left"
        say(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {100 * self.done // max(self.total, 1)} %{speed}"
            f"{', ' if values else ''}{formatted(values)}"
        )

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def formatted(values: Mapping[str, SupportsFloat]) -> str:
    return ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
