"""Text from tokens as they come: never half a character, never any part of a stop string.

    token ids -> IncrementalDetokenizer -> text -> StopStringMatcher -> text that may be shown

Decoders show bytes that are not yet a whole character as U+FFFD at the end of the text; that end is held back
until more tokens settle it. Only the last few tokens are decoded again for each new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_REPLACEMENT = "\ufffd"
# A character has at most four bytes and a token at least one: whatever four more tokens leave broken is broken.
_MAX_CHAR_TOKENS = 4
# Twice that, because byte-fallback decoders show a whole run of bytes as broken, a true U+FFFD in it too.
_MAX_STALLED = 2 * _MAX_CHAR_TOKENS
_MAX_TAIL = 3 * _MAX_CHAR_TOKENS
_MAX_WINDOW = 16
_HARD_MAX_WINDOW = 64


class IncrementalDetokenizer:
    """Turns one request's tokens into text; all pieces together are `decode` of all tokens.

    Args:
        decode: token ids to text, with U+FFFD for broken characters; what to do with special tokens is its choice.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._text = ""
        self._num_given = 0
        self._num_stalled = 0

    def push(self, token_id: int) -> str:
        """The text that this token settles, often empty in the middle of a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._text and self._is_idle(text):
            self._window.pop()  # adds nothing, as skipped special tokens do; however many come, the window stays short
            return ""
        self._text = text
        settled = len(text.rstrip(_REPLACEMENT))
        if settled == len(text) or settled > self._num_given:
            self._num_stalled = 0
        else:
            self._num_stalled += 1
            if self._num_stalled > _MAX_STALLED:
                settled = max(settled, len(text) - _MAX_CHAR_TOKENS + 1)
        piece = text[self._num_given : settled]
        self._num_given = max(self._num_given, settled)
        if len(self._window) >= _MAX_WINDOW:
            self._shorten()
        return piece

    def flush(self) -> str:
        """What is still held back, broken characters as U+FFFD; nothing comes after it."""
        piece = self._text[self._num_given :]
        self._window, self._text, self._num_given, self._num_stalled = [], "", 0, 0
        return piece

    def _is_idle(self, text: str) -> bool:
        """Whether a token that changes nothing can be forgotten; at the very start it may space the next."""
        return not text.endswith(_REPLACEMENT) and (bool(text) or len(self._window) > _MAX_CHAR_TOKENS)

    def _shorten(self) -> None:
        """Drop the window's head at a place where the rest decodes to the same end of the text."""
        held_back = max(0, len(self._text) - self._num_given)
        for num_left in range(_MAX_CHAR_TOKENS + 1, _MAX_TAIL + 1):
            tail = self._decode(self._window[-num_left:])
            sound = tail.lstrip(_REPLACEMENT)
            if sound and len(sound) >= held_back and self._text.endswith(sound):
                break
        else:
            if len(self._window) < _HARD_MAX_WINDOW:
                return
            num_left = _MAX_TAIL  # nothing but broken characters for a long time
            tail = self._decode(self._window[-num_left:])
        self._window = self._window[-num_left:]
        self._text = tail
        self._num_given = max(0, len(tail) - held_back)


class StopStringMatcher:
    """Finds stop strings in text that comes in pieces; how it is cut makes no difference.

    The stop string that ends first wins, among those that end together the longest. Text that may be the
    beginning of one is held back.

    Args:
        stops: the strings; none of them empty.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        assert all(self._stops), "an empty stop string stops everything"
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take text in.

        Returns:
            `(text that may be shown, whether a stop string was found)`; after a stop, always `("", True)`.
        """
        if self.stopped:
            return "", True
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown = self._held[: min(found)[1]]
            self._held = ""
            return shown, True
        split = len(self._held) - self._num_suspect()
        shown, self._held = self._held[:split], self._held[split:]
        return shown, False

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown

    def _num_suspect(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        held = self._held
        longest = min(len(held), max((len(stop) - 1 for stop in self._stops), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(held[-length:]) for stop in self._stops):
                return length
        return 0
