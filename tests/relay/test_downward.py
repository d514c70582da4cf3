"""The down flow: the text that the foundation model writes, and what distilling it into a smaller middle does."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gaisnet.adapters.tuning import LoraSpec, activate, add_adapter, trainable
from gaisnet.config import RelaySettings
from gaisnet.errors import NotFinite
from gaisnet.models.families import Decoder
from gaisnet.models.parts import Body, CutLayers, Tail, cut_decoder
from gaisnet.models.ragged import Ragged
from gaisnet.progress import silent
from gaisnet.relay.downward import Distillation, TaskShape, distil, generate_text
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

SHAPE = TaskShape("Is {text} so?", ("yes", "no"))
FREE = TaskShape(None, ())
BOS, EOS = 256, 257
NEWLINE = tiny_tokenizer().encode("\n")[0]


def settings(**changes: object) -> RelaySettings:
    return RelaySettings.model_validate({"sequences": 12, "tokens": 24, "template_share": 0.5, **changes})


def written(
    shape: TaskShape = SHAPE, seed: int = 1, model: PreTrainedModel | None = None, **changes: object
) -> list[list[int]]:
    return generate_text(model or tiny_model(), tiny_tokenizer(), shape, settings(**changes), seed)


def text_of(ids: list[int]) -> str:
    return str(tiny_tokenizer().decode(ids))


def model_that_says(token: int) -> PreTrainedModel:
    """A real model with a vocabulary head that always finds one token by far the likeliest."""
    model = tiny_model(tied=False)
    lm_head = nn.Linear(32, VOCAB).requires_grad_(False)
    lm_head.bias[token] = 1e4
    model.set_output_embeddings(lm_head)
    return model


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sequences", "tokens"), [(8, 4), (12, 24), (131, 4)])  # the last needs a second batch
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_as_many_sequences_as_asked_none_too_long(sequences: int, tokens: int, share: float) -> None:
    texts = written(sequences=sequences, tokens=tokens, template_share=share)
    assert len(texts) == sequences
    assert all(2 <= len(ids) <= tokens and all(0 <= i < VOCAB for i in ids) for ids in texts)


def test_free_text_starts_at_the_beginning_and_has_full_length() -> None:
    texts = written(FREE)
    assert all(len(ids) == 24 and ids[0] == BOS for ids in texts)
    assert len({tuple(ids) for ids in texts}) == len(texts)


def test_free_text_does_not_stop_at_an_end_of_sequence() -> None:
    assert all(len(ids) == 24 and EOS not in ids for ids in written(FREE, model=model_that_says(EOS)))


def test_a_tokenizer_without_a_beginning_starts_from_the_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert all(ids[0] == EOS for ids in generate_text(tiny_model(), tokenizer, FREE, settings(), 1))


def test_a_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = tiny_model()
    first = written(seed=1, model=model)
    torch.manual_seed(123)
    assert written(seed=1, model=model) == first
    assert written(seed=2, model=model) != first


def test_writing_does_not_disturb_the_global_generator() -> None:
    model = tiny_model()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    written(model=model)
    assert torch.equal(torch.rand(3), expected)


def test_shaped_text_fills_the_template_and_ends_with_a_label() -> None:
    texts = [text_of(ids) for ids in written(template_share=1.0, sequences=16)]
    assert all(text.startswith("Is ") and "\n" not in text for text in texts)
    endings = {text.rpartition(" so?")[2] for text in texts}
    assert endings == {" yes", " no"}
    assert len({text.removeprefix("Is ").rpartition(" so?")[0] for text in texts}) == 16


@pytest.mark.parametrize(("share", "num_shaped"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_the_share_says_how_many_are_shaped(share: float, num_shaped: int) -> None:
    texts = [text_of(ids) for ids in written(template_share=share)]
    assert sum(text.startswith("Is ") and " so?" in text for text in texts) == num_shaped
    assert sum(text.startswith("<s>") for text in texts) == 12 - num_shaped


def test_without_labels_the_text_ends_with_the_template() -> None:
    texts = [text_of(ids) for ids in written(TaskShape("Is {text} so?", ()), template_share=1.0)]
    assert all(text.startswith("Is ") and text.endswith(" so?") for text in texts)


def test_without_a_template_nothing_is_shaped() -> None:
    assert all(ids[0] == BOS for ids in written(TaskShape(None, ("yes", "no")), template_share=1.0))


def test_a_long_ending_leaves_at_least_the_beginning() -> None:
    shape = TaskShape("{text}" + " and so on" * 10, ("yes",))
    assert all(len(ids) == 24 and " and so on and s" in text_of(ids[1:]) for ids in written(shape, template_share=1.0))


@pytest.mark.parametrize("shape", [TaskShape("{text}", ()), TaskShape("{text}", ("a",)), SHAPE])
def test_a_model_that_writes_nothing_still_gives_text_to_learn_from(shape: TaskShape) -> None:
    texts = written(shape, model=model_that_says(NEWLINE), template_share=1.0)
    assert len(texts) == 12 and all(len(ids) >= 2 for ids in texts)


def test_a_low_temperature_repeats_itself() -> None:
    texts = written(FREE, temperature=1e-4)
    assert len({tuple(ids) for ids in texts}) == 1


# -- distillation ------------------------------------------------------------------------------------------------------

START, STOP, LOST = 1, 4, 2


class Lesson:
    """A foundation model, a domain model's body that lost a layer and has a relay, and text as activations."""

    def __init__(self, num: int = 24) -> None:
        model = tiny_model(initializer_range=0.2)
        head, self.body, self.tail = cut_decoder(Decoder(model), CutLayers(START, 1))
        kept = {i: self.body.layers[str(i)] for i in self.body.indices if i != LOST}
        self.smaller = Body(model.config, kept, self.body.rotary_emb)
        texts = generate_text(model, tiny_tokenizer(), SHAPE, settings(sequences=num), seed=1)
        ids = Ragged(torch.tensor([i for ids in texts for i in ids])[:, None], tuple(map(len, texts)))
        self.inputs = ids.map_batches(lambda i: head(i[..., 0]), 8)
        self.targets = self.inputs.map_batches(lambda h: self.body.run(h, START, STOP), 8)
        add_adapter(self.smaller, "relay", LoraSpec(8, 16, ("q_proj", "v_proj", "down_proj"), (1, 3)), seed=0)
        activate(self.smaller, ("relay",))

    def run(self, hidden_BTD: Tensor) -> Tensor:
        return self.smaller.run(hidden_BTD, START, STOP)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        tail: Tail = self.tail
        logits: Tensor = tail(self.body.run(hidden_BTD, STOP))
        return logits

    def learn(self, seed: int = 1, progress: Callable[..., None] = silent, **changes: object) -> Distillation:
        chosen = settings(**{"epochs": 8, "batch_size": 4, "learning_rate": 0.01, **changes})
        parameters = trainable(self.smaller, "relay")
        return distil(self.run, parameters, self.inputs, self.targets, chosen, self.logits, seed, progress)

    @torch.no_grad()
    def held_out_error(self) -> float:
        """One sequence after the other, one position after the other: |hidden - target| / |target|."""
        errors: list[float] = []
        for index in range(0, len(self.inputs), 8):
            found_TD = self.run(self.inputs.sequences()[index][None])[0]
            for found_D, target_D in list(zip(found_TD, self.targets.sequences()[index], strict=True))[1:]:
                errors.append(float((found_D - target_D).norm() / target_D.norm()))
        return sum(errors) / len(errors)


@pytest.mark.parametrize("target", ["hidden", "logits"])
def test_a_lost_layer_is_repaired_on_text_that_was_held_out(target: str) -> None:
    lesson = Lesson()
    before = lesson.held_out_error()
    result = lesson.learn(target=target)
    assert result.error_before == pytest.approx(before, rel=1e-4)
    assert result.error_after == pytest.approx(lesson.held_out_error(), rel=1e-4)
    assert result.error_after < 0.9 * result.error_before


@pytest.mark.parametrize("target", ["hidden", "logits"])
def test_only_the_relay_changes(target: str) -> None:
    lesson = Lesson()
    parts = {"smaller": lesson.smaller, "body": lesson.body, "tail": lesson.tail}
    before = {f"{part}.{name}": t.clone() for part, module in parts.items() for name, t in module.state_dict().items()}
    inputs, targets = lesson.inputs.rows_ND.clone(), lesson.targets.rows_ND.clone()
    lesson.learn(target=target, epochs=1)
    after = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    # The relay sits beside layers that the foundation model has, too: there it appears under the body's names.
    relay = {name for name in after if "lora_" in name}
    assert changed == relay and len([name for name in relay if name.startswith("smaller")]) == 2 * 3 * 2
    assert torch.equal(lesson.inputs.rows_ND, inputs) and torch.equal(lesson.targets.rows_ND, targets)


def test_nothing_is_lost_where_nothing_was_missing() -> None:
    lesson = Lesson()
    lesson.targets = lesson.inputs.map_batches(lesson.run, 8)
    result = lesson.learn(epochs=1)
    assert result.error_before < 1e-5 and result.error_after < 1e-3


def test_a_seed_gives_the_same_relay() -> None:
    def learned(seed: int) -> list[Tensor]:
        lesson = Lesson()
        lesson.learn(seed, epochs=1)
        return [p.detach() for p in trainable(lesson.smaller, "relay")]

    first, again, other = learned(1), learned(1), learned(2)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_every_step_is_told() -> None:
    told: list[tuple[str, int, int, float]] = []

    def note(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        told.append((stage, done, total, figures["relay_loss"]))

    Lesson(num=16).learn(progress=note, epochs=3)
    # 16 sequences, 2 of them held out, in batches of 4: 4 steps in each of 3 epochs
    assert [(stage, done, total) for stage, done, total, _ in told] == [("relay", i, 12) for i in range(1, 13)]
    assert sum(loss for *_, loss in told[8:]) < sum(loss for *_, loss in told[:4])


@pytest.mark.parametrize("target", ["hidden", "logits"])
def test_a_loss_that_is_not_finite_names_the_step(target: str) -> None:
    lesson = Lesson()
    with pytest.raises(NotFinite, match=r"the relay's loss at step [1-9]\d* is (nan|inf)"):
        lesson.learn(target=target, learning_rate=1e30)


def test_broken_activations_are_met_at_the_first_step() -> None:
    lesson = Lesson()
    lesson.inputs.rows_ND.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"the relay's loss at step 0 is nan.*is on disk"):
        lesson.learn()


def test_a_sequence_of_one_token_teaches_nothing_and_breaks_nothing() -> None:
    lesson = Lesson()
    short = lesson.inputs.rows_ND[:1].expand(24, -1).clone()
    lesson.inputs = Ragged(torch.cat([short, lesson.inputs.rows_ND]), (*(1,) * 24, *lesson.inputs.lengths))
    lesson.targets = lesson.inputs.map_batches(lambda h: lesson.body.run(h, START, STOP), 8)
    result = lesson.learn(batch_size=1, epochs=1)
    assert result.error_after < result.error_before
