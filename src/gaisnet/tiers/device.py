"""A device: the only place that sees private text and labels. It holds head and tail, or (local) the whole DM."""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gaisnet.config import Config, DeviceSettings
from gaisnet.errors import DataError, UnexpectedMessage, WireFormatError
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    BodyOutput,
    BodyOutputGrad,
    Done,
    EvaluationReport,
    FineTune,
    Message,
    ModelRelease,
    SmashedData,
    SmashRequest,
    Split,
)
from gaisnet.models.parts import Head, Tail
from gaisnet.models.ragged import Ragged
from gaisnet.models.release import ReleasedModel
from gaisnet.progress import Progress, silent
from gaisnet.tiers.activations import Activations
from gaisnet.tiers.domain_model import DomainModel
from gaisnet.tiers.examples import DeviceData, Tokens, tokenize
from gaisnet.tiers.split_step import Member, Outcome
from gaisnet.tiers.stock import Parts, Stock
from gaisnet.turn import Turn

_HEAD_BATCH = 32
_TAIL_ROWS = 64  # a vocabulary is long: more at once would keep answers on the same machine waiting


class Device:
    """Answers its edge.

    Args:
        settings: Its own entry of the configuration.
        config: The run's configuration.
        tokenizer: The FM's.
        data: Its private examples.
        progress: Told while a local device learns.
        turn: Of the machine that it is on, held while it computes; None for one of its own.
        stock: Of the same machine: frozen parts, shared by its devices; None for one of its own.
        learns: Whether it must have examples to learn from.

    Raises:
        DataError: No example to hold out, or to learn from if it learns, or a completion longer than the context.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        data: DeviceData,
        progress: Progress = silent,
        turn: Turn | None = None,
        stock: Stock | None = None,
        learns: bool = True,
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._config = config
        self._progress = progress
        self._turn = turn or Turn()
        self._stock = stock or Stock(config, self._turn)
        self.tokenizer = tokenizer
        self._tokens: dict[Split, list[Tokens]] = {}
        splits: tuple[tuple[Split, Sequence[object], bool], ...] = (
            ("train", data.train, learns),
            ("test", data.test, True),
        )
        for split, examples, needed in splits:
            if needed and not examples:
                raise DataError(
                    f"device '{self.name}'", f"has no {split} examples", "give it some, or remove the device"
                )
        context = config.model.context
        self._tokens["train"] = tokenize(data.train, tokenizer, context, f"device '{self.name}', train")
        self._tokens["test"] = tokenize(data.test, tokenizer, context, f"device '{self.name}', test")
        self._parts: Parts | None = None
        self._domain: DomainModel | None = None
        self._learning_inputs: Activations | None = None

    def handle(self, message: Message) -> Message:
        """Answer the edge. Raises ``UnexpectedMessage``."""
        match message:
            case ModelRelease():
                return self._install(message)
            case SmashRequest():
                return self._smash(message.split)
            case BodyOutput(split="train"):
                return self._loss_and_grad(message)
            case BodyOutput(split="test"):
                return self._score(message)
            case AnchorRelease() if self._domain is not None:
                self._domain.take_anchor(message)
                return Done()
            case AdapterRelease() if self._domain is not None:
                return self._take(self._domain, message)
            case FineTune() if self._domain is not None:
                return self._learn_alone(self._domain, message)
            case _:
                raise UnexpectedMessage(f"device '{self.name}'", type(message).__name__)

    def _install(self, release: ModelRelease) -> Done:
        self._parts = parts = self._stock.parts(release, self._settings)
        if self._settings.mode == "local":  # a body of its own, for its adapters; the weights are shared
            body = ReleasedModel(parts.release).body(self._settings.head_layers, parts.layout.tail_start)
            self._domain = DomainModel(body, parts.layout, self._turn)
        return Done()

    def _smash(self, split: Split) -> SmashedData:
        tokens = self._tokens[split]
        embedded = Ragged(
            torch.tensor([i for t in tokens for i in t.input_ids])[:, None], tuple(len(t.input_ids) for t in tokens)
        )
        hidden = embedded.map_batches(self._run_head, _HEAD_BATCH)
        return SmashedData(
            self.name,
            split,
            self._settings.head_layers,
            torch.tensor(hidden.lengths, dtype=torch.int32),
            torch.tensor([len(t.label_ids) for t in tokens], dtype=torch.int32),
            hidden.rows_ND,
        )

    def _run_head(self, ids_BT1: Tensor) -> Tensor:
        with self._turn.learning():
            return cast(Tensor, self.parts()[0](ids_BT1[..., 0]))

    def _loss_and_grad(self, output: BodyOutput) -> BodyOutputGrad:
        """Sum of the losses, and the gradient of (sum / labels of the whole step) at the rows."""
        sent_ND = output.rows_ND.requires_grad_()
        rows_ND, labels_N = self._before_logits(output, sent_ND)
        leaf_ND, loss_sum = rows_ND.detach().requires_grad_(), 0.0
        for logits_RV, labels_R in self._logits(leaf_ND, labels_N):
            with self._turn.learning():
                loss = F.cross_entropy(logits_RV.float(), labels_R, reduction="sum")
                (loss / output.num_labels_total).backward()
            loss_sum += loss.item()
        with self._turn.learning():
            (grad_ND,) = torch.autograd.grad(rows_ND, sent_ND, leaf_ND.grad)
        return BodyOutputGrad(output.step, loss_sum, grad_ND)

    @torch.no_grad()
    def _score(self, output: BodyOutput) -> EvaluationReport:
        rows_ND, labels_N = self._before_logits(output, output.rows_ND)
        right, loss_sum = [], 0.0
        for logits_RV, labels_R in self._logits(rows_ND, labels_N):
            right.append(logits_RV.argmax(dim=-1) == labels_R)
            loss_sum += F.cross_entropy(logits_RV.float(), labels_R, reduction="sum").item()
        counts = [len(t.label_ids) for t in self._chosen(output)]
        num_correct = sum(bool(rights.all()) for rights in torch.cat(right).split(counts))
        return EvaluationReport(len(counts), num_correct, len(labels_N), loss_sum)

    def _logits(self, rows_ND: Tensor, labels_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [R, V] and labels [R] of some rows at a time."""
        for rows_RD, labels_R in zip(rows_ND.split(_TAIL_ROWS), labels_N.split(_TAIL_ROWS), strict=True):
            with self._turn.learning():
                logits_RV = self.parts()[1].logits(rows_RD)
            yield logits_RV, labels_R

    def _before_logits(self, output: BodyOutput, rows_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [N, D] at the label positions that the last norm takes, and the labels [N]."""
        _, tail = self.parts()
        chosen = self._chosen(output)
        labels_N = torch.tensor([label for t in chosen for label in t.label_ids])
        norm = next(tail.norm.parameters())
        if rows_ND.shape[-1] != len(norm):
            raise WireFormatError(f"rows of width {rows_ND.shape[-1]} where the model has {len(norm)}")
        rows_ND = rows_ND.to(norm.dtype)
        if self._config.tail_layers:
            with self._turn.learning():
                rows_ND = _tail_layers(tail, rows_ND, chosen, self.name)
        if len(rows_ND) != len(labels_N):
            raise WireFormatError(f"{len(rows_ND)} rows for the {len(labels_N)} labels of device '{self.name}'")
        return rows_ND, labels_N

    def _chosen(self, output: BodyOutput) -> list[Tokens]:
        tokens = self._tokens[output.split]
        indices = output.examples_E.tolist()
        if not indices or min(indices) < 0 or max(indices) >= len(tokens):
            raise WireFormatError(f"example numbers that device '{self.name}' does not have")
        return [tokens[index] for index in indices]

    def _take(self, domain: DomainModel, release: AdapterRelease) -> Done:
        domain.take(release)
        if release.role == "relay":
            self._learning_inputs = None
        return Done()

    def _learn_alone(self, domain: DomainModel, order: FineTune) -> AdapterUpdate:
        if self._learning_inputs is None:
            smashed = Activations.of(self._smash("train"), *domain.placement())
            self._learning_inputs = domain.prefix(smashed)
        member = Member(self.name, self._learning_inputs)
        where = f"device '{self.name}', cycle {order.cycle}, edge round {order.edge_round}"
        seed = self._config.seed_for("fine_tune", self.name, order.cycle, order.edge_round)
        settings = self._config.fine_tune.in_cycle(order.cycle)
        learned = domain.learn([member], self._own_labels, settings, seed, where, self._progress)
        for error in learned.left.values():  # it has only itself
            raise error
        return AdapterUpdate(
            version=order.cycle + 1,
            base=domain.versions["domain"],
            num_examples=learned.num_examples,
            num_steps=learned.num_steps,
            loss=learned.loss,
            faults=(),
            tensors=domain.domain_adapter(),
        )

    def _own_labels(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        return {name: self._loss_and_grad(output) for name, output in outputs.items()}

    @property
    def test_tokens(self) -> Sequence[Tokens]:
        """Examples that it held out. They stay on it."""
        return self._tokens["test"]

    def parts(self) -> tuple[Head, Tail]:
        """To write answers with. Raises ``UnexpectedMessage`` before the edge has given it a model."""
        if self._parts is None:
            raise UnexpectedMessage(f"device '{self.name}', which has no model yet,", "request for its head or tail")
        return self._parts.head, self._parts.tail


def _tail_layers(tail: Tail, rows_ND: Tensor, chosen: Sequence[Tokens], name: str) -> Tensor:
    """Run the tail's own layers over whole sequences; label rows [N, D] of the result."""
    lengths = [len(t.input_ids) for t in chosen]
    if len(rows_ND) != sum(lengths):
        raise WireFormatError(f"{len(rows_ND)} rows for {sum(lengths)} positions of device '{name}'")
    hidden_BTD = tail.stack.run(pad_sequence(list(rows_ND.split(lengths)), batch_first=True))
    return torch.cat(
        [hidden_BTD[b, n - len(t.label_ids) : n] for b, (n, t) in enumerate(zip(lengths, chosen, strict=True))]
    )
