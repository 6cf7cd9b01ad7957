r"""Say whether two mathematical answers are equivalent, with math-verify.

1. The answer is the last closed ``\boxed{...}``; without one, what math-verify finds in the text.
2. math-verify's comparison is not symmetric; here two answers are equivalent if it says so in either
   direction, or if they are the same words once ``\text`` and the like are removed.
3. Its time limits use a signal, which works in the main thread only and cannot stop one long multiplication.
   They are switched off here: `equivalent` is for texts that are trusted, `MathJudge` asks a second
   process and ends it when it takes too long.

Run as a program, this file is that second process: one JSON pair a line in, one verdict a line out.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any, Literal

from mechdiff.errors import ConfigError
from mechdiff.functional.answers import last_boxed

Verdict = Literal["right", "wrong", "unparsable", "undecided"]
MAX_CHARS = 4000
"""Characters from the end of an answer without a box that are searched."""
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|textit|mbox|operatorname)\s*\{([^{}]*)\}")
_READY = "ready"
_DECIDED: dict[str, Verdict] = {"right": "right", "wrong": "wrong", "unparsable": "unparsable"}


def equivalent(gold: str, answer: str) -> Verdict:
    """Compare an answer with the gold answer; safe in any thread, but without a time limit.

    Args:
        gold: The right answer as LaTeX, without a box.
        answer: A generated solution, or an answer alone.

    Returns:
        ``right``, ``wrong``, or ``unparsable`` if no answer is found in the text.
    """
    boxed = last_boxed(answer)
    if boxed is not None and not boxed:
        return "unparsable"
    if boxed is not None and _plain(boxed) == _plain(gold):
        return "right"
    parse, verify = _math_verify()
    found = parse(rf"$\boxed{{{boxed}}}$" if boxed else answer[-MAX_CHARS:], parsing_timeout=None)
    if not found:
        if _plain(answer) == _plain(gold):
            return "right"
        return "unparsable" if boxed is None else "wrong"
    wanted = parse(rf"$\boxed{{{gold}}}$", parsing_timeout=None)
    same = verify(wanted, found, timeout_seconds=None) or verify(found, wanted, timeout_seconds=None)
    return "right" if same else "wrong"


class MathJudge:
    """Compare answers in a second process, from any thread, each within a time limit.

    Args:
        seconds: Time limit for one answer; after it the process is ended and the verdict is ``undecided``.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        if seconds <= 0:
            raise ConfigError(
                f"the time limit of an answer is {seconds} s; it must be above 0 (key: seconds)"
            )
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> MathJudge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, gold: str, answer: str) -> Verdict:
        """Compare an answer with the gold answer."""
        with self._lock:
            process = self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            expired = threading.Event()

            def end() -> None:
                expired.set()
                process.kill()

            timer = threading.Timer(self.seconds, end)
            timer.start()
            try:
                process.stdin.write(json.dumps([gold, answer]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline().strip()
            except BrokenPipeError:
                reply = ""
            finally:
                timer.cancel()
                timer.join()  # it has fired or never will
            if expired.is_set() or reply not in _DECIDED:  # the process is gone, or was killed as it answered
                self._stop()
            return _DECIDED.get(reply, "undecided")

    def close(self) -> None:
        """End the second process; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            _math_verify()  # say here, once, that it is missing
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            assert self._process.stdout is not None
            ready = self._process.stdout.readline().strip()
            assert ready == _READY, f"the second process said {ready!r}"
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _plain(text: str) -> str:
    return "".join(_WORDS.sub(r"\1", text).replace("$", "").split()).rstrip(".").casefold()


def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            "install math-verify for benchmarks of kind math: pip install 'math-verify[antlr4_13_2]'"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    return parse, verify


def _serve() -> None:
    _math_verify()
    print(_READY, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        print(equivalent(gold, answer), flush=True)


if __name__ == "__main__":
    _serve()
