"""File descriptors of the process: connections must leave enough for its files."""

import resource

_MOST = 8192  # requested descriptors: more than a site's peers need, in tables that cost little
_SHARE = 2  # one in this many may be a connection


def room_for_connections() -> int:
    """Raise the process's limit of descriptors; return the number of connections that a listener may hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if hard == resource.RLIM_INFINITY else min(_MOST, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most // _SHARE
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most // _SHARE
