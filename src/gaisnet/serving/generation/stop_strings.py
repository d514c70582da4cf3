"""Stop strings in a text that arrives in pieces, found in linear time (Knuth, Morris and Pratt, 1977)."""

import copy
from collections.abc import Sequence


class StopStrings:
    """Passes on the text of an answer that certainly precedes every stop string.

    The text ends before the stop string that is complete first; of several that end at the same character, before the
    longest. How the text is cut into pieces makes no difference.

    Args:
        stops: Strings that end the text; empty ones do not.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._searches = [_Search(stop) for stop in stops if stop]
        self._held = ""  # may become a stop string, or a part of one
        self.found = False
        """Whether the text has ended."""

    def feed(self, piece: str) -> str:
        """Add a piece; return the text that has become certain, possibly empty."""
        self._held += piece
        start = len(self._held) - len(piece)
        for at, character in enumerate(piece, start + 1):
            lengths = [search.length for search in self._searches if search.complete(character)]
            if lengths:
                self.found = True
                return self._release(at - max(lengths))
        return self._release(len(self._held) - max((search.matched for search in self._searches), default=0))

    def before_stop_in(self, piece: str) -> str | None:
        """Return the text before the stop string that ``piece`` would complete next; None if it completes none."""
        if not piece:
            return None
        ahead = copy.copy(self)
        ahead._searches = [copy.copy(search) for search in self._searches]
        text = ahead.feed(piece)
        return text if ahead.found else None

    def rest(self) -> str:
        """Return all held text when no more comes; nothing after a stop string."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, end: int) -> str:
        given, self._held = self._held[:end], self._held[end:]
        return given


class _Search:
    """Matches one stop string against the end of the text."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self.length = len(stop)
        self.matched = 0
        self._borders = [0]  # for each prefix, its longest proper prefix that is also its suffix
        for character in stop[1:]:
            self._borders.append(self._longer(self._borders[-1], character))

    def complete(self, character: str) -> bool:
        """Add a character; return whether the text now ends with the stop string. Not to be called after that."""
        self.matched = self._longer(self.matched, character)
        return self.matched == self.length

    def _longer(self, matched: int, character: str) -> int:
        while matched and self._stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self._stop[matched] == character)
