"""File descriptors of the process: connections must not use up those that its files need."""

import resource

_MOST = 8192  # descriptors that are asked for: more than a site's peers need, in tables that cost little
_SHARE = 2  # one in so many may be a connection


def room_for_connections() -> int:
    """Connections that a listener may hold, after the process has been given as many descriptors as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if hard == resource.RLIM_INFINITY else min(_MOST, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most // _SHARE
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most // _SHARE
