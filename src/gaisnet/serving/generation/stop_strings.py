"""Stop strings in a text that comes in pieces, found in time linear in the text (Knuth, Morris and Pratt, 1977)."""

import copy
from collections.abc import Sequence


class StopStrings:
    """Takes the text of an answer and gives what is certain to stand before every stop string.

    The text ends before the stop string that is complete first; of several that end at the same character, before the
    longest. How the text is cut into pieces makes no difference.

    Args:
        stops: Strings that end the text; empty ones do not.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._searches = [_Search(stop) for stop in stops if stop]
        self._held = ""  # it may become a stop string, or a part of one
        self.found = False
        """Whether the text has ended."""

    def take(self, piece: str) -> str:
        """Take the next piece; gives what has become certain, be it empty."""
        self._held += piece
        start = len(self._held) - len(piece)
        for at, character in enumerate(piece, start + 1):
            lengths = [search.length for search in self._searches if search.complete(character)]
            if lengths:
                self.found = True
                return self._release(at - max(lengths))
        return self._release(len(self._held) - max((search.matched for search in self._searches), default=0))

    def before_stop_in(self, piece: str) -> str | None:
        """Text before the stop string that ``piece`` would complete if it came next; None if it completes none."""
        if not piece:
            return None
        ahead = copy.copy(self)
        ahead._searches = [copy.copy(search) for search in self._searches]
        text = ahead.take(piece)
        return text if ahead.found else None

    def rest(self) -> str:
        """All that is held back, where no more text comes; nothing behind a stop string."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, end: int) -> str:
        given, self._held = self._held[:end], self._held[end:]
        return given


class _Search:
    """Counts the characters of one stop string that the text ends with."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self.length = len(stop)
        self.matched = 0
        self._borders = [0]  # of each beginning, the longest proper beginning that it also ends with
        for character in stop[1:]:
            self._borders.append(self._longer(self._borders[-1], character))

    def complete(self, character: str) -> bool:
        """Take a character; whether the text now ends with the whole stop string. Not to be called after that."""
        self.matched = self._longer(self.matched, character)
        return self.matched == self.length

    def _longer(self, matched: int, character: str) -> int:
        while matched and self._stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self._stop[matched] == character)
