"""The down flow: the text that the foundation model writes, and what fitting a smaller middle to it does."""

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import LoraSpec, activate, add_adapter
from gaisnet.config.learning import RelaySettings
from gaisnet.errors import NotFinite
from gaisnet.learning.regression import fit_low_rank
from gaisnet.learning.relay import (
    RELAY,
    TaskTemplate,
    TextStates,
    fit_relay,
    generate_text,
    relative_error,
    run_middle,
)
from gaisnet.models.families import Decoder
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from gaisnet.models.ragged import Ragged
from gaisnet.progress import silent
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numeric

SHAPE = TaskTemplate("Is {text} so?", ("yes", "no"))
FREE = TaskTemplate(None, ())
BOS, EOS = 256, 257
NEWLINE = tiny_tokenizer().encode("\n")[0]


def settings(**changes: object) -> RelaySettings:
    return RelaySettings.model_validate({"tokens": 24, **changes})


def written(
    shape: TaskTemplate = SHAPE, num: int = 12, seed: int = 1, model: PreTrainedModel | None = None, **changes: object
) -> list[list[int]]:
    return generate_text(model or tiny_model(), tiny_tokenizer(), shape, num, settings(**changes), seed)


def text_of(ids: list[int]) -> str:
    return str(tiny_tokenizer().decode(ids))


def model_that_says(token: int) -> PreTrainedModel:
    """A real model with a vocabulary head that always finds one token by far the likeliest."""
    model = tiny_model(tied=False)
    lm_head = nn.Linear(32, VOCAB).requires_grad_(False)
    lm_head.bias[token] = 1e4
    model.set_output_embeddings(lm_head)
    return model


def model_that_says_by_chance(chances: Mapping[int, float]) -> PreTrainedModel:
    """A real model whose vocabulary head gives tokens these chances, whatever was written."""
    model = tiny_model(tied=False)
    lm_head = nn.Linear(32, VOCAB).requires_grad_(False)
    lm_head.weight.zero_()
    lm_head.bias.fill_(-1e4)
    for token, chance in chances.items():
        lm_head.bias[token] = math.log(chance)
    model.set_output_embeddings(lm_head)
    return model


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "tokens"), [(8, 4), (12, 24), (131, 4)])  # the last needs a second batch
@pytest.mark.parametrize("shape", [FREE, SHAPE])
def test_as_many_sequences_as_asked_none_too_long(num: int, tokens: int, shape: TaskTemplate) -> None:
    texts = written(shape, num, tokens=tokens)
    assert len(texts) == num
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
    assert all(ids[0] == EOS for ids in generate_text(tiny_model(), tokenizer, FREE, 12, settings(), 1))


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
    texts = [text_of(ids) for ids in written(num=16)]
    assert all(text.startswith("Is ") and "\n" not in text for text in texts)
    endings = {text.rpartition(" so?")[2] for text in texts}
    assert endings == {" yes", " no"}
    assert len({text.removeprefix("Is ").rpartition(" so?")[0] for text in texts}) == 16


def test_without_labels_the_text_ends_with_the_template() -> None:
    texts = [text_of(ids) for ids in written(TaskTemplate("Is {text} so?", ()))]
    assert all(text.startswith("Is ") and text.endswith(" so?") for text in texts)


def test_without_a_template_nothing_is_shaped() -> None:
    assert all(ids[0] == BOS for ids in written(TaskTemplate(None, ("yes", "no"))))


def test_a_long_ending_leaves_at_least_the_beginning() -> None:
    shape = TaskTemplate("{text}" + " and so on" * 10, ("yes",))
    for ids in written(shape):  # one token is left to write, and it may be a space
        assert len(ids) >= 23 and " and so on and" in text_of(ids)


@pytest.mark.parametrize("shape", [TaskTemplate("{text}", ()), TaskTemplate("{text}", ("a",)), SHAPE])
def test_a_model_that_writes_nothing_still_gives_text_to_learn_from(shape: TaskTemplate) -> None:
    texts = written(shape, model=model_that_says(NEWLINE))
    assert len(texts) == 12 and all(len(ids) >= 2 for ids in texts)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_the_model_says(temperature: float) -> None:
    chances = {10: 0.7, 20: 0.25, 30: 0.05}
    model = model_that_says_by_chance(chances)
    drawn = [token for ids in written(FREE, num=96, model=model, temperature=temperature) for token in ids[1:]]
    assert set(drawn) <= set(chances)
    sharper = {token: chance ** (1 / temperature) for token, chance in chances.items()}
    for token, weight in sharper.items():
        chance = weight / sum(sharper.values())
        spread = math.sqrt(chance * (1 - chance) / len(drawn))
        assert abs(drawn.count(token) / len(drawn) - chance) < 4 * spread


def test_a_low_temperature_repeats_itself() -> None:
    texts = written(FREE, temperature=1e-4)
    assert len({tuple(ids) for ids in texts}) == 1


# -- repair ------------------------------------------------------------------------------------------------------------

START, STOP, LOST = 1, 4, 2


class RelayFixture:
    """A foundation model, a domain model's body that lost a layer and has a relay, and text as the former sees it."""

    def __init__(self, num: int = 64, layers: tuple[int, ...] = (1, 3)) -> None:
        model = tiny_model(initializer_range=0.2)
        head, self.body, self.tail = cut_decoder(Decoder(model), CutLayers(START, 1))
        kept = {i: self.body.layers[str(i)] for i in self.body.indices if i != LOST}
        self.smaller = Body(model.config, kept, self.body.rotary_emb)
        texts = generate_text(model, tiny_tokenizer(), SHAPE, num, settings(), seed=1)
        ids = Ragged(torch.tensor([i for ids in texts for i in ids])[:, None], tuple(map(len, texts)))
        states = {START: ids.map_batches(lambda i: head(i[..., 0]), 8)}
        for start, stop in pairwise((1, 3, 4)):
            states[stop] = states[start].map_batches(partial(self.body.run, start=start, stop=stop), 8)
        self.fitted, self.test = TextStates(states).split()
        self.spec = LoraSpec(8, 16, ("down_proj",), layers)
        add_adapter(self.smaller, RELAY, self.spec, seed=0)
        activate(self.smaller, (RELAY,))

    def repaired(self, penalty: float = 0.1) -> AdapterTensors:
        return fit_relay(self.smaller, self.spec, self.fitted, penalty, silent)

    @torch.no_grad()
    def error(self, text: TextStates) -> float:
        """One sequence after the other, one position after the other: |hidden - target| / |target|."""
        errors: list[float] = []
        pairs = zip(text.states[START].sequences(), text.states[STOP].sequences(), strict=True)
        for inputs_TD, targets_TD in pairs:
            found_TD = self.smaller.run(inputs_TD[None], START, STOP)[0]
            for found_D, target_D in list(zip(found_TD, targets_TD, strict=True))[1:]:
                errors.append(float((found_D - target_D).norm() / target_D.norm()))
        return sum(errors) / len(errors)


def test_a_lost_layer_is_repaired_on_text_that_was_held_out() -> None:
    fixture = RelayFixture()
    before = fixture.error(fixture.test)
    assert relative_error(run_middle(fixture.smaller, fixture.test), fixture.test) == pytest.approx(before, rel=1e-4)
    fixture.repaired()
    after = relative_error(run_middle(fixture.smaller, fixture.test), fixture.test)
    assert after == pytest.approx(fixture.error(fixture.test), rel=1e-4)
    assert after < 0.9 * before


def test_each_layer_mends_what_those_before_left() -> None:
    both, first = RelayFixture(), RelayFixture(layers=(1,))
    both.repaired()
    first.repaired()
    assert relative_error(run_middle(both.smaller, both.fitted), both.fitted) < relative_error(
        run_middle(first.smaller, first.fitted), first.fitted
    )


def test_a_layer_s_relay_is_fitted_to_what_enters_the_next() -> None:
    """Run a layer naively: its missing output, relative to the target, is what the relay fits."""
    fixture = RelayFixture(layers=(1,))
    relay = fixture.repaired()
    entering: list[Tensor] = []
    module = fixture.smaller.get_submodule("layers.1.mlp.down_proj")
    module.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0][0]))
    put_in(fixture.smaller, RELAY, {key: torch.zeros_like(t) for key, t in relay.items()})
    with torch.no_grad():
        found = [fixture.smaller.run(h[None], 1, 2)[0] for h in fixture.fitted.states[1].sequences()]
    target = fixture.fitted.states[3].rows_ND
    size = target.norm(dim=1, keepdim=True)
    a, b = fit_low_rank(torch.cat(entering) / size, (target - torch.cat(found)) / size, 8, 0.1)
    product = relay["layers.1.mlp.down_proj.lora_B.weight"] @ relay["layers.1.mlp.down_proj.lora_A.weight"]
    assert torch.allclose(2.0 * product, b @ a, atol=1e-4)  # alpha / rank


def test_only_the_relay_changes() -> None:
    fixture = RelayFixture()
    parts = {"smaller": fixture.smaller, "body": fixture.body, "tail": fixture.tail}
    before = {f"{part}.{name}": t.clone() for part, module in parts.items() for name, t in module.state_dict().items()}
    states = {layer: states.rows_ND.clone() for layer, states in fixture.fitted.states.items()}
    relay = fixture.repaired()
    after = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    # The relay sits beside layers that the foundation model has, too: there it appears under the body's names.
    assert changed == {name for name in after if "lora_" in name}
    assert len([name for name in changed if name.startswith("smaller")]) == 2 * 2
    assert all(torch.equal(fixture.fitted.states[layer].rows_ND, rows) for layer, rows in states.items())
    assert all(torch.equal(relay[key], tensor) for key, tensor in take_out(fixture.smaller, RELAY).items())


def test_nothing_is_lost_where_nothing_was_missing() -> None:
    fixture = RelayFixture()
    run, inputs = fixture.smaller.run, fixture.fitted.states[1]
    ends = {stop: inputs.map_batches(partial(run, start=1, stop=stop), 8) for stop in (3, 4)}
    fixture.fitted = TextStates({1: inputs, **ends})
    fixture.repaired()
    assert relative_error(run_middle(fixture.smaller, fixture.fitted), fixture.fitted) < 1e-3


def test_what_a_relay_was_before_does_not_matter() -> None:
    fixture = RelayFixture()
    first = fixture.repaired()
    put_in(fixture.smaller, RELAY, {key: torch.ones_like(tensor) for key, tensor in first.items()})
    again = fixture.repaired()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_every_layer_is_told() -> None:
    told: list[tuple[str, int, int, float]] = []

    def note(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        told.append((stage, done, total, figures["relay_loss"]))

    fixture = RelayFixture()
    fit_relay(fixture.smaller, fixture.spec, fixture.fitted, 0.1, note)
    assert [(stage, done, total) for stage, done, total, _ in told] == [("relay", 1, 2), ("relay", 2, 2)]
    assert all(0.0 < loss < 1.0 for *_, loss in told)


def test_broken_activations_name_the_layer() -> None:
    fixture = RelayFixture()
    fixture.fitted.states[3].rows_ND.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"the relay's error at layer 1 is nan.*is on disk"):
        fixture.repaired()


def test_a_sequence_of_one_token_breaks_nothing() -> None:
    fixture = RelayFixture()
    one = {layer: Ragged(states.rows_ND[:1], (1,)) for layer, states in fixture.fitted.states.items()}
    before = relative_error(run_middle(fixture.smaller, fixture.test), fixture.test)
    fixture.fitted = fixture.fitted.concatenate(TextStates(one))
    fixture.repaired()
    assert relative_error(run_middle(fixture.smaller, fixture.test), fixture.test) < before


def test_every_eighth_sequence_is_held_out() -> None:
    states = Ragged(torch.arange(20.0)[:, None], (1,) * 20)
    fitted, test = TextStates({0: states, 1: states}).split()
    assert test.states[0].rows_ND[:, 0].tolist() == [0, 8, 16]
    assert len(fitted) == 17 and fitted.states[1].rows_ND[:, 0].tolist() == [i for i in range(20) if i % 8]
