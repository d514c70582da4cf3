"""A whole network whose messages do not fit a frame: it learns what it learns with large ones, bit for bit."""

from typing import Any

import pytest
import torch

from gaisnet.messages import Chunk, Parcel
from tests.engines.test_local_network import Run, alone

pytestmark = pytest.mark.integration

LARGE = {"smashed": "float32", "anchor": "float32", "body_output": "float32"}
TALKATIVE: dict[str, Any] = {
    "fine_tune": {"local_epochs": 1, "batch_size": 64, "learning_rate": 0.01},
    "tail_layers": 1,
}


def run(**wire: int) -> Run:
    """One cycle of a domain; its adapter alone is longer than 64 KiB."""
    adapters = {"rank": 24, "alpha": 24, "first_layer": 3}
    domain = {"precision": "int8", "keep_layers": None}
    return Run(alone(wire={**LARGE, **wire}, adapters=adapters, domain=domain, **TALKATIVE)).go()


def test_a_network_with_frames_of_64_kib_learns_what_one_with_large_frames_does() -> None:
    large, small = run(), run(max_message_bytes=2**16)
    assert small.scores == large.scores
    for mine, theirs in zip(small.updates, large.updates, strict=True):
        for domain, update in theirs.items():
            assert {name: torch.equal(t, update.tensors[name]) for name, t in mine[domain].tensors.items()} == (
                dict.fromkeys(update.tensors, True)
            )
    frames = [frame for _, _, frame in small.ledger.frames]
    assert max(map(len, frames)) <= 2**16 < max(len(frame) for _, _, frame in large.ledger.frames)
    crossed = {parcel.message for parcel in small.ledger.of(Parcel)}
    assert {"ModelRelease", "AdapterUpdate", "AdapterRelease"} <= crossed
    assert not large.ledger.of(Parcel)
    more = sum(map(len, frames)) - sum(len(frame) for _, _, frame in large.ledger.frames)
    assert 0 < more < 1_300 * len(small.ledger.of(Chunk))
