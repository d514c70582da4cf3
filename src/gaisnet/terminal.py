"""Sanitizing of foreign text before a terminal or a log shows it.

Models, peers and files may contain control sequences that clear the screen, set its title or fill
the clipboard, and marks that reverse the direction of letters.
"""

import logging
import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, except tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction
    "\u2028\u2029\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"  # lines, halves of characters, hidden tags
)


def safe(text: str) -> str:
    """Return the text with visible escapes in place of control characters; tabs and new lines stay."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def safe_line(text: str) -> str:
    """Return the text in one line: a line after a line feed could pass for one of ours."""
    return safe(text).replace("\n", "\\n")


class SafeFormatter(logging.Formatter):
    """Formats each log message in one line, whatever it contains; tracebacks keep their lines."""

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
        level: A level of ``logging``; less important messages are left out.
        form: As ``logging.Formatter`` takes it.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])
