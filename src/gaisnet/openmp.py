"""OpenMP settings for small products, set before torch is first imported.

They say how long OpenMP's threads spin before they sleep. Within a layer the next product comes in microseconds, and
waking a thread takes longer than a small product; but on a shared machine, threads that spin for milliseconds, the
default, slow down all others (docs/decisions/0009-products-on-onednn.md). torch reads them when it is imported.
"""

import os


def set_wait_policy() -> None:
    """Set OpenMP's environment variables, unless the user has set the wait policy."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE"  # otherwise threads hardly spin at all once two of them compute
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's and Intel's OpenMP would spin without end
