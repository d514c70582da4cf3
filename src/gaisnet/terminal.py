"""Text of others, made harmless before a terminal or a log shows it.

Models, peers and files may hold what a terminal obeys: escape sequences that clear the screen, set its title or fill
the clipboard, and marks that let letters run backwards.
"""

import logging
import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, except tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction
    "\u2028\u2029\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"  # lines, halves of characters, hidden tags
)


def safe(text: str) -> str:
    """The same text, with visible escapes in place of what a terminal would obey; tabs and new lines stay."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def safe_line(text: str) -> str:
    """The same in one line: what follows a line feed could pass for a line of ours."""
    return safe(text).replace("\n", "\\n")


class SafeFormatter(logging.Formatter):
    """Lines of a log in which each message is one line, whatever it holds; tracebacks keep theirs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        record.message = safe_line(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        return safe(super().format(record))


def log_to_stderr(level: int, form: str) -> None:
    """Send the log of this process to standard error.

    Args:
        level: One of ``logging``'s; less important messages are left out.
        form: As ``logging.Formatter`` takes it.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])
