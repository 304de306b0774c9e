"""What an option's type says beside its kind: bounds and unit of a number, length of a text.

`block_size: Annotated[int, Between(1, 65536, "tokens")]` is checked alike whether a file, a flag or Python gave it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, get_type_hints

from anabranch.errors import ConfigError

MAX_COUNT = 2**31 - 1
_PORT = re.compile(r"[0-9]{1,5}")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Between:
    """A number from `least` to `most`.

    Attributes:
        unit: in the plural; empty: the option's name says what is counted.
    """

    least: int
    most: int = MAX_COUNT
    unit: str = ""

    def remedy(self, value: int) -> str | None:
        """What to do about a value that is out of bounds."""
        if self.least <= value <= self.most:
            return None
        bound = f"least {self.least}" if value < self.least else f"most {self.most}"
        return f"must be at {bound} ({self.unit})" if self.unit else f"must be at {bound}"


@dataclass(frozen=True)
class Duration:
    """Seconds: more than none, and less than a day."""

    def remedy(self, value: float) -> str | None:
        """What to do about a value that is out of bounds."""
        return None if 0.0 < value < 86400.0 else "must be above 0 and below 86400 seconds"


@dataclass(frozen=True)
class Text:
    """Text that can be an argument of a process, and stand in a line of its log."""

    max_chars: int

    def remedy(self, value: str) -> str | None:
        """What to do about a text that is too long, or has what cannot be printed."""
        if len(value) <= self.max_chars and not _CONTROL.search(value):
            return None
        return f"must have at most {self.max_chars} characters, and no control characters"


Bound = Between | Duration | Text
Count = Annotated[int, Between(1)]
Tokens = Annotated[int, Between(1, unit="tokens")]
# May be given as text, such as "512MiB".
Size = Annotated[int, Between(1, 1 << 50, "bytes")]
SizeOrNone = Annotated[int, Between(0, 1 << 50, "bytes")]
# gRPC and ZeroMQ take these as 32-bit numbers.
MessageSize = Annotated[int, Between(1, MAX_COUNT, "bytes")]
Seconds = Annotated[float, Duration()]
# A path or an address.
Line = Annotated[str, Text(4096)]


def bounds_of(options: type) -> Mapping[str, Bound]:
    """The bounds of those fields of a dataclass that have any."""
    hints = get_type_hints(options, include_extras=True)
    found = {name: getattr(hint, "__metadata__", ())[:1] for name, hint in hints.items()}
    return {name: first[0] for name, first in found.items() if first and isinstance(first[0], Bound)}


class Options:
    """Base of dataclasses of options: they are within the bounds that their types say, or cannot be made."""

    def __post_init__(self) -> None:
        for name, bound in bounds_of(type(self)).items():
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if (remedy := bound.remedy(value)) is not None:
                    raise ConfigError(name, value, remedy)


def is_port(text: str) -> bool:
    """Whether a text is a TCP port, 0 included."""
    return _PORT.fullmatch(text) is not None and int(text) <= 65535
