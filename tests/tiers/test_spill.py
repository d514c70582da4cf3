"""Spilled activations are bit for bit those in memory, and no files remain."""

import gc
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gaisnet.config import Config
from gaisnet.engines.local import build_network
from gaisnet.errors import ActivationsNotKept, TooFewEdges
from gaisnet.learning.relay import TaskTemplate
from gaisnet.network import Network
from gaisnet.tiers.edge.spill import spill_beyond
from tests.disk import largest_file
from tests.tiny import tiny_config, tiny_data, tiny_foundation

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def rows(num_bytes: int = MIB) -> Tensor:
    return torch.randn(num_bytes // 64, 16)


def mapped_files() -> int:
    """Return the mappings of activations in this process."""
    return Path("/proc/self/maps").read_text().count("gaisnet-activations-")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the folder of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# -- rows --------------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_beyond_the_limit_are_the_same_in_a_file_without_a_name(folder: Path, dtype: torch.dtype) -> None:
    given = rows().to(dtype).t()  # not contiguous
    before = mapped_files()
    found = spill_beyond(given, (), 0)
    assert torch.equal(found, given) and found.dtype == dtype
    assert mapped_files() == before + 1 and list(folder.iterdir()) == []
    del found
    assert mapped_files() == before


@pytest.mark.parametrize("max_mib", [None, 1, 2])
def test_rows_within_the_limit_stay(max_mib: int | None) -> None:
    given = rows()
    assert spill_beyond(given, (), max_mib) is given


def test_what_is_in_memory_besides_counts_and_what_is_in_files_does_not(folder: Path) -> None:
    in_file = spill_beyond(rows(), (), 0)
    assert spill_beyond(in_file, (rows(),), 1) is in_file
    given = rows()
    assert spill_beyond(given, [in_file] * 5, 1) is given
    assert spill_beyond(given, (rows(64),), 1) is not given


@pytest.mark.parametrize("max_mib", [None, 0])
def test_no_rows_need_no_file(max_mib: int | None) -> None:
    given = torch.empty(0, 16)
    assert spill_beyond(given, (), max_mib) is given


def test_a_full_disk_is_an_error_and_leaves_no_file(folder: Path) -> None:
    with (
        largest_file(MIB // 2),
        pytest.raises(ActivationsNotKept, match=r"keeping 1 MiB of activations in a file of '.*File too large; free"),
    ):
        spill_beyond(rows(), (), 0)
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_error(folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(ActivationsNotKept, match="No such file"):
        spill_beyond(rows(), (), 0)


# -- an edge -----------------------------------------------------------------------------------------------------------


def config(max_mib: int | None) -> Config:
    return tiny_config(service={"max_activations_mib": max_mib})


def installed(config: Config) -> Network:
    foundation = tiny_foundation(initializer_range=0.1)
    shapes = {edge.domain: TaskTemplate(edge.template, edge.labels) for edge in config.edges}
    network = build_network(config, foundation, shapes, tiny_data(config), "some public text " * 40)
    network.install()
    return network


@linux
def test_an_edge_learns_the_same_with_its_activations_in_files(folder: Path) -> None:
    before, found = mapped_files(), []
    for max_mib, num_files in ((None, 0), (0, 2 * 2 * 5)):  # edges; before and after a prefix; splits of devices
        network = installed(config(max_mib))
        network.release()
        network.evaluate()
        updates = network.fine_tune()
        found.append((updates, network.evaluate()))
        assert mapped_files() == before + num_files
        del network
        gc.collect()
        assert mapped_files() == before
    (in_memory, scores), (in_files, same) = found
    assert scores == same
    for domain, update in in_memory.items():
        assert all(torch.equal(tensor, in_files[domain].tensors[key]) for key, tensor in update.tensors.items())


def test_a_full_disk_ends_an_order_and_the_next_goes_on(folder: Path) -> None:
    network = installed(config(0))
    network.release()
    with largest_file(64), pytest.raises(TooFewEdges, match="shapes: keeping .* of activations .*; tastes: keeping"):
        network.fine_tune()
    assert {name for name in network.fine_tune()} == {"shapes", "tastes"}


def test_a_machine_without_a_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/dev/null/none")
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/null/none"])
    with pytest.raises(ActivationsNotKept, match="in a file of '/dev/null/none': .*No usable temporary directory"):
        spill_beyond(rows(), [], 0)
