"""The parser of the command line: pair files that replace each other whole, and mistakes told in one line."""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from transformers.utils.logging import disable_progress_bar

from mechdiff.errors import LONGEST_LINE, cut, printable, without_secrets
from mechdiff.pairs.spec import PairSpec

_KEY = re.compile(r"(?:[kK]ey \"|option ')([\w.]+)")
_UNKNOWN = re.compile(r"(?:[oO]ption '([\w.]+)' is not accepted|does not accept option '([\w.]+)')")
_FILE = re.compile(r"Unable to load config ['\"](.+?)['\"]")
_GIVEN = re.compile(r"(?:Got value|Given value): (.*)")
_WANTED = re.compile(r"Expected an? (.+?)(?:\. Got value.*)?$", re.MULTILINE)
_CLASS = re.compile(r"Problem with given class_path '(.+?)':\s*(.*)")
_PLACE = re.compile(r"\s*in \"<.*?>\", (line \d+, column \d+)")
_NAMES = {
    "NoneType": "null",
    "Sequence": "a list",
    "list": "a list",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
}


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line instead of a usage page."""

    typed: Sequence[str] = ()
    """The command line, to name an option as it was typed."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse; files that are no text, or without an end, are mistakes of the user as well."""
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            at = f"byte {error.start} of {cut(error.object)}"
            self.error(f"a configuration or pair file is not UTF-8: {at}")
        except RecursionError:
            self.error("a configuration or pair file is nested too deeply")
        raise AssertionError("an error ends the process")

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Print the message and exit with code 2."""
        line = without_secrets(shorten(message, type(self).typed))
        print(f"mechdiff: {printable(line, LONGEST_LINE)}", file=sys.stderr)
        raise SystemExit(2)


def shorten(message: str, typed: Sequence[str] = ()) -> str:
    """Put a message of the parser into one line that names the value, what is allowed and the key.

    Args:
        message: What the parser says; for a value that fits none of several types it lists them all.
        typed: The command line.
    """
    unknown = _UNKNOWN.search(message)
    if unknown:
        return f"unknown key {_full(unknown[1] or unknown[2], typed)}; --help lists the known ones"
    if message.startswith("unrecognized arguments"):
        return f"unknown argument {message.partition(': ')[2]}; --help lists the known ones"
    if "Unexpected config" in message:
        return "a configuration holds no mapping of keys to values (key: config)"
    keys = _KEY.findall(message)
    key = f" (key: {_full(keys[-1], typed)})" if keys else ""
    imported = _CLASS.search(message)
    if imported:
        return f"class {imported[1]} cannot be imported: {imported[2]}{key}"
    given, wanted, file = _GIVEN.search(message), _WANTED.findall(message), _FILE.search(message)
    if given and wanted:
        allowed = [name for name in dict.fromkeys(map(_readable, wanted)) if name]
        return f"{cut(given[1])} is given; allowed: {', '.join(allowed)}{key}"
    if file and not Path(file[1]).is_file():
        return f"no such file: {file[1]}; expected a YAML file{key}"
    places = _PLACE.findall(message)
    if places:
        reason = [line for line in message.splitlines() if line.strip() and not _PLACE.match(line)][-1]
        what = f"{file[1]}: " if file else ""
        return f"{what}not YAML: {reason.strip()} at {places[-1]}{key}"
    if (
        file
        and keys
        and set(map(str.strip, message.splitlines()[2:]))
        <= {f'- Parser key "{keys[-1]}": {_unable(file[1])}'}
    ):
        return f"{file[1]} holds no mapping of keys to values{key}"
    said = [line.strip(" -\t") for line in message.splitlines() if not _FILE.search(line)]
    return (
        "; ".join(line for line in said if line and not re.fullmatch(r"Parser key \"[\w.]+\":", line)) + key
    )


def replace_whole_pairs(parser: LightningArgumentParser) -> None:
    """Let a pair file replace the pair before it.

    The parser alone would keep what the new file leaves out, such as the adapter of the old pair.
    """
    action: Any = next(a for a in parser._actions if a.dest == "pair")
    load = action._load_config
    defaults = {k: Namespace(v) if k in ("base", "tuned") else v for k, v in asdict(PairSpec()).items()}

    def load_whole(value: Any, parser: Any) -> Namespace:
        loaded = load(value, parser)
        if isinstance(value, str):
            given = set(loaded.keys())  # of the leaves, such as tuned.adapter
            for key, default in Namespace(defaults).items():
                if not any(name == key or name.startswith(f"{key}.") for name in given):
                    loaded[key] = default
        return loaded

    action._load_config = load_whole


def _unable(file: str) -> str:
    return f'Unable to load config "{file}"'


def _full(key: str, typed: Sequence[str]) -> str:
    """Return a key as it was typed: inside a class the parser forgets whose it is."""
    options = [word.lstrip("-").partition("=")[0] for word in typed if word.startswith("--")]
    return next((option for option in options if option.endswith(f".{key}")), key)


def _readable(wanted: str) -> str:
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", wanted)
    if choices:
        return choices[1].replace("'", "")
    kind = re.fullmatch(r"<class '(?:.*\.)?(\w+)'>", wanted)
    if kind:
        return _NAMES.get(kind[1], kind[1])
    return "a class path" if wanted.startswith("dot import path") else ""


def quiet() -> None:
    """Keep notices that a user of this library cannot act on off the screen."""
    disable_progress_bar()
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed", "pytorch.trainer.connectors"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*will run with no optimizer.*",
        ".*srun.*",
        ".*GPU available but not used.*",
        ".*treespec.*",
        ".*is_gradient_checkpointing.*",
        ".*smaller than the logging interval.*",
        ".*dirpath has changed.*",
        ".*Checkpoint directory .* exists.*",
    ):
        warnings.filterwarnings("ignore", message=text)


@contextmanager
def ends_when_told() -> Iterator[None]:
    """Let SIGTERM end what runs inside, with exit code 143.

    Lightning's own handler only takes note of the signal, which nothing reads while a test or a prediction
    runs; it calls the handler that it finds as well. A handler of the caller's is left alone.

    Raises:
        SystemExit: Where the signal comes.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
