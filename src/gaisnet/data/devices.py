"""Loading of every device's examples: from its folder, or from a built-in data set with label skew."""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from gaisnet.config import Config, DealtShare, EdgeSettings
from gaisnet.config.learning import AbsorbSettings
from gaisnet.data.builtin import BUILT_IN, DrawnExamples, domain_seed, draw_builtin
from gaisnet.data.examples import DeviceData, Example, Input, Labelled
from gaisnet.data.jsonl import read_examples, read_inputs
from gaisnet.errors import DataError
from gaisnet.learning.relay import TaskTemplate

# Draws of the proportions until every device has examples. If all fail, there are too few examples for the skew.
MAX_DRAWS = 100
# Proportions are equal to a thousandth from here on; for far larger values numpy's Dirichlet returns zeros.
EVEN_ALPHA = 1e6
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs for English
_Labelled = TypeVar("_Labelled")


@dataclass(frozen=True)
class DomainData:
    """A domain's public task and its private examples by device name."""

    template: str | None
    labels: tuple[str, ...]
    devices: dict[str, DeviceData[Any]]


IN_MEMORY = "memory:"
"""Begins the data "folder" of a device whose examples were given as Python objects."""
Given = Mapping[str, DeviceData[Any]]
"""Examples that were given as Python objects, by device."""


def load_domains(config: Config, given: Given = MappingProxyType({})) -> dict[str, DomainData]:
    """Load the data of all edges, by domain; examples in memory are ``given``. Raises ``DataError``."""
    return {edge.domain: _load_edge(edge, config, given) for edge in config.edges}


@dataclass(frozen=True)
class LoadedData:
    """The available data of a run that is only served, which needs no examples.

    Attributes:
        domains: Data by domain as from ``load_domains``, without devices whose examples are missing.
        absent: Errors of these devices, by name.
    """

    domains: dict[str, DomainData]
    absent: dict[str, str]


def load_available(config: Config) -> LoadedData:
    """Load all examples that can be read, without raising for the others."""
    absent: dict[str, str] = {}
    return LoadedData({edge.domain: _load_available_edge(edge, config, absent) for edge in config.edges}, absent)


def _load_available_edge(edge: EdgeSettings, config: Config, absent: dict[str, str]) -> DomainData:
    devices: dict[str, DeviceData[Any]] = {}
    for device in edge.devices:
        try:
            devices[device.name] = load_device(config, device.name)
        except DataError as error:
            absent[device.name] = str(error)
    try:
        task = load_public_task(edge, config).task
    except DataError:  # its package is not installed, but without training no text is generated from the template
        task = TaskTemplate(None, ())
    return DomainData(task.template, task.labels, devices)


@dataclass(frozen=True)
class PublicTask:
    """Public facts about a domain; ``majority`` is None where examples are private."""

    task: TaskTemplate
    majority: float | None


def load_public_task(edge: EdgeSettings, config: Config) -> PublicTask:
    """Return the public facts about an edge's domain, which include built-in data. Raises ``DataError``."""
    if not config.deals(edge):
        followed = _followed(edge, config)
        return PublicTask(TaskTemplate(edge.template or followed.template, edge.labels or followed.labels), None)
    domain = _load_edge(edge, config)
    return PublicTask(TaskTemplate(domain.template, domain.labels), majority_share(domain))


def load_device(config: Config, name: str) -> DeviceData[Any]:
    """Load one device's examples, reading no other device's files. Raises ``DataError``."""
    edge, device = next((edge, device) for edge, device in config.each_device() if device.name == name)
    if device.data is None:
        return _load_edge(edge, config).devices[name]
    return _read_device(device.data, name, edge).with_validation_split(config.absorb.validation_share, name)


def _load_edge(edge: EdgeSettings, config: Config, given: Given = MappingProxyType({})) -> DomainData:
    found, share = _load_edge_unsplit(edge, config, given), config.absorb.validation_share
    return replace(
        found, devices={name: mine.with_validation_split(share, name) for name, mine in found.devices.items()}
    )


def _load_edge_unsplit(edge: EdgeSettings, config: Config, given: Given) -> DomainData:
    """Load an edge's examples before validation sets are split off."""
    folders = {device.name: device.data for device in edge.devices if device.data is not None}
    without = [device.name for device in edge.devices if device.name not in folders]
    followed = _followed(edge, config)
    if not without:
        devices = {name: _read_device(folder, name, edge, given) for name, folder in folders.items()}
        return DomainData(edge.template or followed.template, edge.labels or followed.labels, devices)
    asked = f"domain '{edge.domain}' of edge '{edge.name}'"
    if folders:
        found = f"some of its devices name 'data', but not {', '.join(without)}"
        raise DataError(asked, found, "give every device of the edge a data folder, or none")
    if not config.deals(edge):
        found = "its devices have data of their own, which this site's configuration says nothing of"
        do = "start the network's sites instead, or say where they are, with --set edges.N.devices.N.data=FOLDER"
        raise DataError(asked, found, do)
    if edge.adapter not in BUILT_IN or (edge.follows and not config.deals(followed)):
        found = "is not built in, and its devices name no 'data'"
        raise DataError(asked, found, f"give every device a data folder, or use one of: {', '.join(BUILT_IN)}")
    if edge.template is not None or edge.labels:
        found = "is built in, so its template and labels are fixed"
        raise DataError(asked, found, "remove 'template' and 'labels', or give every device a data folder")
    share = dealt_share(edge, edge.devices[0].name, config)
    if share is None:
        raise DataError(asked, "it is dealt no built-in data", "give every device a data folder")
    return _deal(_draw(edge, share, config), edge, share, config)


def _followed(edge: EdgeSettings, config: Config) -> EdgeSettings:
    """Return the edge whose adapter this edge uses; itself in a newcomer's kit, which has the shared settings."""
    return next((each for each in config.edges if each.domain == edge.adapter), edge)


def dealt_share(edge: EdgeSettings, device: str, config: Config) -> DealtShare | None:
    """Return a device's share of a built-in data set; None where it has data of its own."""
    if not config.deals(edge):
        return None
    if config.elsewhere is not None and config.elsewhere.share is not None:
        return config.elsewhere.share
    newcomers = [each.domain for each in config.edges if each.follows == edge.adapter and config.deals(each)]
    return DealtShare(
        num_devices=len(edge.devices),
        device=[each.name for each in edge.devices].index(device),
        num_newcomers=len(newcomers),
        newcomer=0 if edge.follows is None else newcomers.index(edge.domain),
    )


def _draw(edge: EdgeSettings, share: DealtShare, config: Config) -> DrawnExamples:
    """Draw an edge's part of a built-in data set."""
    drawn = draw_builtin(edge.adapter, config.data, config.seed, share.num_newcomers)
    if edge.follows is None:
        return drawn
    return replace(drawn, train=(), test=drawn.newcomer_tests[share.newcomer])


def _deal(drawn: DrawnExamples, edge: EdgeSettings, share: DealtShare, config: Config) -> DomainData:
    """Deal examples to devices with the same label proportions in training and test set. Raises ``DataError``."""
    names = _owners(edge, share)
    alpha, seed = config.data.dirichlet_alpha, domain_seed(edge.domain, config.seed)

    def parts(examples: Sequence[Example], draw: int) -> list[list[Example]]:
        return partition_by_label(examples, _completion, len(names), alpha, np.random.default_rng([seed, draw]))

    least = 2 if config.absorb.validation_share else 1  # one may be for validation
    for draw in range(MAX_DRAWS):
        train, test = parts(drawn.train, draw), parts(drawn.test, draw)
        if all(test) and (min(map(len, train)) >= least or not drawn.train):
            break
    else:
        unlucky = next(i for i in range(len(names)) if drawn.train and len(train[i]) < least or not test[i])
        raise DataError(
            f"device '{names[unlucky]}' of domain '{edge.domain}', with data.dirichlet_alpha {alpha}",
            f"got {len(train[unlucky])} training and {len(test[unlucky])} test examples in the last of {MAX_DRAWS} "
            f"draws, out of {len(drawn.train)} and {len(drawn.test)} for {len(names)} devices",
            "raise data.dirichlet_alpha, data.train_examples or data.test_examples, or use fewer devices",
        )
    devices = {name: DeviceData(tuple(train[i]), tuple(test[i])) for i, name in enumerate(names)}
    return DomainData(drawn.template, drawn.labels, devices)


def _owners(edge: EdgeSettings, share: DealtShare) -> list[str]:
    """Return the names of an edge's devices in order, with numbers for devices that a kit does not name."""
    names = [device.name for device in edge.devices]
    if len(names) == share.num_devices:
        return names
    return [names[0] if place == share.device else f"#{place}" for place in range(share.num_devices)]


def _completion(example: Example) -> str:
    return example.completion


def partition_by_label(
    examples: Sequence[_Labelled],
    labels_of: Callable[[_Labelled], str],
    num_devices: int,
    alpha: float,
    rng: np.random.Generator,
) -> list[list[_Labelled]]:
    """Deal ``examples`` to devices, each label in proportions drawn from a Dirichlet (Hsu et al., arXiv 1909.06335).

    The smaller ``alpha``, the fewer devices share a label. Parts keep the order of ``examples`` and may be empty.
    Generators in the same state give a label the same proportions whatever the other labels are, so that training and
    test set of a domain are dealt alike.
    """
    base = int(rng.integers(2**32))
    by_label: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        by_label.setdefault(labels_of(example), []).append(i)
    owner_of = np.empty(len(examples), dtype=np.int64)
    for label, members in by_label.items():
        label_rng = np.random.default_rng([base, zlib.crc32(label.encode())])
        shares = label_rng.dirichlet(np.full(num_devices, min(alpha, EVEN_ALPHA)))
        # Parts end at rounded cumulative shares, so that no example is lost or duplicated.
        ends = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        owner_of[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
    parts: list[list[_Labelled]] = [[] for _ in range(num_devices)]
    for example, owner in zip(examples, owner_of.tolist(), strict=True):
        parts[owner].append(example)
    return parts


def _read_device(folder: Path, name: str, edge: EdgeSettings, given: Given = MappingProxyType({})) -> DeviceData[Any]:
    if name in given:
        return given[name]
    if str(folder).startswith(IN_MEMORY):
        found = "were given as Python objects, which a run does not keep"
        do = "give them again, with gaisnet.resume(out, data={...}), or name a folder with --set edges.N.devices.N.data"
        raise DataError(f"examples of device '{name}'", found, do)
    train: tuple[Example | Labelled, ...] = () if edge.follows else read_examples(folder / "train.jsonl", name)
    return DeviceData(train, read_examples(folder / "test.jsonl", name))


def load_public_inputs(config: Config) -> tuple[Input, ...]:
    """Load public inputs for an encoder, if the configuration names a file. Raises ``DataError``."""
    return () if config.model.public_inputs is None else read_inputs(config.model.public_inputs)


def public_text(settings: AbsorbSettings) -> str:
    """Return as much of ``retention_text`` as the gate's windows need."""
    return retention_text(settings.retention_windows * settings.retention_tokens * _CHARACTERS_PER_TOKEN)


def retention_text(num_chars: int) -> str:
    """Return the first characters of Python's documentation topics: English text that no domain trains on.

    It depends on Python's version only. Raises ``DataError`` where the topics are not installed or are shorter.
    """
    asked = f"{num_chars} characters of public text for the retention perplexity"
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        found = "this Python comes without pydoc_data"
        raise DataError(asked, found, "use a Python with its whole standard library") from error
    text = "\n".join(topics[name] for name in sorted(topics))
    if len(text) < num_chars:
        do = "lower absorb.retention_windows or absorb.retention_tokens"
        raise DataError(asked, f"Python's documentation topics have {len(text)}", do)
    return text[:num_chars]


def majority_share(domain: DomainData) -> float:
    """Return the share of the most frequent answer in a domain's test sets, all devices together.

    This is the accuracy of always giving that answer, the baseline for a trained model.
    """
    counts = Counter(_answer(example) for data in domain.devices.values() for example in data.test)
    return max(counts.values()) / counts.total()


def _answer(example: Example | Labelled) -> str:
    return example.label if isinstance(example, Labelled) else example.completion
