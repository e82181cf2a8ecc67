"""Regular expressions with a bound on their work: a pattern may come with a file, and some would run for years."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable

from fxquant.core.errors import OptionError

STEPS = 10**8
"""Ways of matching one name that may be tried: some seconds."""
_COUNT = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return a test for whole names.

    Python's matcher goes back and tries again: a name of n letters takes up to `n^k` steps for k repeats one after the
    other, and `2^n` for a repeat of what repeats or has alternatives. The test refuses what may take too many.

    Args:
        pattern: a regular expression of Python's `re`.

    Raises:
        OptionError: it is none, repeats what repeats or has alternatives, or refers back; and from the test, where the
            name is too long for the expression.
    """
    try:
        with warnings.catch_warnings():
            # What may mean something else in a later Python means what it means here.
            warnings.simplefilter("ignore", FutureWarning)
            expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise OptionError(f"pattern 're:{pattern:.200}' is not a regular expression: {error}") from error
    repeats = _repeats(pattern)

    def matches(word: str) -> bool:
        if math.prod(min(most, len(word) + 1) for most in repeats) > STEPS:
            raise OptionError(
                f"pattern 're:{pattern:.200}' repeats too much for a name of {len(word)} letters; "
                "write it with fewer *, + and ?, or give several patterns"
            )
        return expression.fullmatch(word) is not None

    return matches


def _repeats(pattern: str) -> list[float]:
    """Return how often each repeat of an expression may repeat.

    Raises:
        OptionError: a repeat holds another or alternatives, or there is a reference to a group.
    """
    found: list[float] = []
    # For each open group, whether it can match one text in several ways.
    open_groups, last, place = [False], False, 0
    while place < len(pattern):
        letter, after = pattern[place], place + 1
        if letter == "\\":
            if pattern[after : after + 1] in set("123456789"):
                raise _refused(pattern, "refers to a group")
            last, after = False, place + 2
        elif letter == "[" and (members := _CLASS.match(pattern, place)):
            last, after = False, members.end()
        elif letter == "(":
            if pattern.startswith(("(?P=", "(?("), place):
                raise _refused(pattern, "refers to a group")
            open_groups.append(False)
            after += pattern.startswith("(?", place)
        elif letter == ")" and len(open_groups) > 1:
            last = open_groups.pop()
            open_groups[-1] |= last
        elif letter == "|":
            open_groups[-1] = True
        elif (most := _most(pattern, place)) is not None:
            if last and most > 1:
                raise _refused(pattern, "repeats what repeats or has alternatives")
            count = _COUNT.match(pattern, place)
            after = count.end() if count else after
            # What follows says how greedy it is.
            after += pattern[after : after + 1] in ("?", "+")
            found.append(max(most, 2.0))
            open_groups[-1] = True
        else:
            last = False
        place = after
    return found


def _most(pattern: str, place: int) -> float | None:
    """Return how often what stands in front may be repeated, None where that is no repeat."""
    count = _COUNT.match(pattern, place)
    if count is not None and (count[1] or count[3]):
        least, comma, most = count.groups()
        return float(most) if most else math.inf if comma else float(least)
    return {"*": math.inf, "+": math.inf, "?": 1.0}.get(pattern[place])


def _refused(pattern: str, why: str) -> OptionError:
    return OptionError(f"pattern 're:{pattern:.200}' {why}, which could take for ever; write it without, or as a glob")
