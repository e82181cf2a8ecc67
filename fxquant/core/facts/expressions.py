"""Regular expressions, matched in a process of their own that is ended after some seconds.

A pattern may come with a file that somebody else made. For some patterns Python's matcher tries 2^n ways for a name of
n letters, and no thread or signal can stop it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

from fxquant.core.errors import OptionError

SECONDS = 10.0
"""Limit for one pattern and all names, the start of the process included."""

CHILD = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
pattern, names = json.load(sys.stdin)
try:
    test = re.compile(pattern).fullmatch
except (re.error, RecursionError, OverflowError) as error:
    answer = str(error)
else:
    answer = [name for name in names if test(name)]
json.dump(answer, sys.stdout)
"""


def matched(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a regular expression matches as a whole.

    Args:
        pattern: a regular expression of Python's `re`.
        names: what to match.

    Raises:
        OptionError: it is not a regular expression, or matching takes longer than `SECONDS`.
    """
    # A search asks several times for the same pattern and layers.
    return list(_matched(pattern, tuple(names), SECONDS))


@lru_cache(maxsize=256)
def _matched(pattern: str, names: tuple[str, ...], seconds: float) -> tuple[str, ...]:
    shown = f"pattern 're:{pattern:.200}'"
    asked = json.dumps([pattern, names])
    try:
        # -I and -S: nothing of the user's is imported, and the process starts in some 20 ms.
        command = [sys.executable, "-I", "-S", "-c", CHILD]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=seconds, check=True)
    except subprocess.TimeoutExpired:
        raise OptionError(
            f"{shown} takes longer than {seconds:g} s to match {len(names)} names; "
            "write it with fewer *, + and |, or as a glob"
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise OptionError(f"{shown} could not be matched: {error}; write it as a glob") from error
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        raise OptionError(f"{shown} is not a regular expression: {answer}")
    return tuple(answer)
