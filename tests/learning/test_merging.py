"""Merging by regression: the least squares that it promises, module by module, on what each adapter sees."""

import pytest
import torch
from torch import Tensor

from gaisnet.adapters.arithmetic import side_by_side
from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import LoraSpec, activate, add_adapter
from gaisnet.config.learning import MergeSettings
from gaisnet.learning.merging import filter_factors, merge_by_regression
from gaisnet.learning.regression import second_moments, trace_layer
from gaisnet.models.parts import Body
from gaisnet.models.ragged import Ragged
from tests.adapters.bodies import SPEC, TARGETS, body_with, product

pytestmark = pytest.mark.numeric


def rows(num: int, width: int, seed: int) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def test_nothing_is_nearer_to_what_each_adapter_does_where_it_belongs() -> None:
    """The gradient of the least squares, by automatic differentiation, is zero there and nowhere beside."""
    settings = MergeSettings(free_text=0.4, ridge=0.05, weight=0.6)
    factors = [rows(2, 6, seed) for seed in (0, 1, 2)]
    outer = [rows(5, 2, seed) for seed in (3, 4, 5)]
    texts, free = [rows(num, 6, num).double() for num in (4, 9, 30)], rows(20, 6, 99).double()
    seen = [second_moments(x) for x in texts]
    total = sum(seen, 0.4 * second_moments(free))
    ridge = 0.05 * float(total.diagonal().mean())
    own = [(b @ a).double() for a, b in zip(factors, outer, strict=True)]
    together = sum(own, torch.zeros(5, 6).double())
    found = [
        b @ a
        for a, b in zip(filter_factors(factors, seen, second_moments(free), settings).split(2), outer, strict=True)
    ]

    def loss(merged: Tensor) -> Tensor:
        apart = [((x @ (merged - w).T).square().sum() / len(x)) for x, w in zip(texts, own, strict=True)]
        return (
            torch.stack(apart).sum()
            + 0.4 * (free @ merged.T).square().sum() / len(free)
            + ridge * (merged - 0.6 * together).square().sum()
        )

    merged = sum(found, torch.zeros(5, 6)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(merged), merged)
    elsewhere = together.clone().requires_grad_()
    (there,) = torch.autograd.grad(loss(elsewhere), elsewhere)
    assert gradient.abs().max() < 1e-4 * there.abs().max()


def test_domains_that_never_see_the_same_keep_what_they_have_and_free_text_is_left_alone() -> None:
    settings = MergeSettings(free_text=1.0, ridge=1e-6)
    basis = torch.linalg.qr(rows(9, 9, 0)).Q
    texts = [rows(20, 3, seed) @ basis[3 * seed : 3 * seed + 3] for seed in range(3)]
    factors, outer = [rows(2, 9, 5), rows(2, 9, 6)], [rows(4, 2, 7), rows(4, 2, 8)]
    found = filter_factors(factors, [second_moments(x) for x in texts[:2]], second_moments(texts[2]), settings).split(2)
    merged = sum((b @ a for a, b in zip(found, outer, strict=True)), torch.zeros(4, 9))
    for x, a, b in zip(texts[:2], factors, outer, strict=True):
        torch.testing.assert_close(x @ merged.T, x @ (b @ a).T, atol=1e-3, rtol=1e-3)
    assert (texts[2] @ merged.T).abs().max() < 1e-3


def test_where_no_text_speaks_it_is_the_weighted_sum() -> None:
    settings = MergeSettings(free_text=1.0, ridge=0.5, weight=0.7)
    basis = torch.linalg.qr(rows(9, 9, 0)).Q
    texts = [rows(20, 3, seed) @ basis[:3] for seed in range(3)]  # six directions are never seen
    factors = [rows(2, 9, 5), rows(2, 9, 6)]
    found = filter_factors(factors, [second_moments(x) for x in texts[:2]], second_moments(texts[2]), settings).split(2)
    for new, old in zip(found, factors, strict=True):
        torch.testing.assert_close(new @ basis[3:].T, 0.7 * old @ basis[3:].T, atol=1e-5, rtol=1e-4)
        assert (new @ basis[:3].T - 0.7 * old @ basis[:3].T).abs().max() > 0.05


def states(body: Body) -> tuple[dict[str, Ragged], Ragged]:
    lengths = {"a": (4, 7), "b": (3, 3, 8)}
    entering = {name: Ragged(rows(sum(n), 32, len(n)), n) for name, n in lengths.items()}
    return entering, Ragged(rows(9, 32, 11), (9,))


def merged_by_the_way(body: Body, settings: MergeSettings) -> AdapterTensors:
    """Layer by layer, as the cloud does it."""
    entering, free = states(body)

    def trace(name: str | None, layer: int, hidden: Ragged) -> tuple[dict[str, Ragged], Ragged]:
        activate(body, () if name is None else (name,))
        return trace_layer(body, "a", layer, hidden)

    return merge_by_regression({n: take_out(body, n) for n in entering}, entering, free, SPEC.layers, trace, settings)


def merged_by_hand(body: Body, settings: MergeSettings) -> AdapterTensors:
    """All modules at once, every sequence by itself, hooks on every module."""
    entering, free = states(body)

    def seen_by(name: str | None, text: Ragged) -> dict[str, Tensor]:
        activate(body, () if name is None else (name,))
        found: dict[str, list[Tensor]] = {}
        handles = []
        for path, module in body.named_modules():
            if path.rsplit(".", 1)[-1] in TARGETS:
                found[path] = []
                keep = found[path]
                handles.append(module.register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0][0, 1:])))
        for sequence in text.sequences():
            body.run(sequence[None], 3)
        for handle in handles:
            handle.remove()
        return {path: torch.cat(parts).double() for path, parts in found.items() if parts}

    of_domains = [seen_by(name, text) for name, text in entering.items()]
    of_free = seen_by(None, free)
    activate(body, ())
    adapters = [take_out(body, name) for name in entering]
    merged = side_by_side(adapters)
    for path in of_free:
        grams = [x[path].T @ x[path] / len(x[path]) for x in of_domains]
        total = sum(grams, settings.free_text * of_free[path].T @ of_free[path] / len(of_free[path]))
        ridge = settings.ridge * total.diagonal().mean() * torch.eye(len(total))
        inverse = torch.linalg.inv(total + ridge)
        key = f"{path}.lora_A.weight"
        merged[key] = torch.cat(
            [
                (a[key].double() @ (g + settings.weight * ridge) @ inverse).float()
                for a, g in zip(adapters, grams, strict=True)
            ]
        )
    return merged


@pytest.mark.parametrize("free_text", [0.0, 0.5])
def test_it_is_the_same_as_by_hand(free_text: float) -> None:
    body, settings = body_with("a", "b"), MergeSettings(free_text=free_text, ridge=0.1)
    found, expected = merged_by_the_way(body, settings), merged_by_hand(body, settings)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=1e-3)


def test_it_acts_like_each_adapter_where_that_belongs_nearer_than_a_sum() -> None:
    body, settings = body_with("a", "b"), MergeSettings(free_text=0.3, ridge=0.01)
    entering, _ = states(body)
    add_adapter(body, "merged", LoraSpec(2 * SPEC.rank, 2 * SPEC.alpha, TARGETS, SPEC.layers), seed=9)

    def distance(merged: AdapterTensors) -> float:
        """Return the error of the first adapted layer's output, against each adapter's on its own text."""
        put_in(body, "merged", merged)
        total = 0.0
        for name, text in entering.items():
            leaving = []
            for active in (name, "merged"):
                activate(body, (active,))
                leaving.append(torch.cat([body.run(s[None], 3, 4)[0, 1:] for s in text.sequences()]))
            total += float((leaving[0] - leaving[1]).square().mean())
        return total

    found = merged_by_the_way(body, settings)
    sums = [side_by_side([take_out(body, name) for name in entering], weight) for weight in (0.5, 0.7, 1.0)]
    assert distance(found) < 0.5 * min(map(distance, sums))
    assert product(found, "layers.3.self_attn.q_proj", 1, 1).shape == (32, 32)
