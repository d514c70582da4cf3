"""Streams over gRPC between listeners and dialers, with mutual TLS. All of the grpc library is used in here."""

import os

# Else its core writes a line to the log for each stranger that knocks at the port.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
