"""The end of the up flow: one adapter from the adapters of many domains.

Every product B A acts wherever the adapter does, also on other domains' text. Regression (RegMean, Jin et al., arXiv
2212.09849, on text that the foundation model (FM) generated) fits the merged product: on a module's inputs in a
domain's text it should give what that domain's own product gives, and nothing on free text. Since generated text does
not cover all of a domain's text, it should also stay near the weighted sum of the products. The least squares have a
closed form: each A goes through a filter, (G_d + weight * ridge) S^-1, where G_d is the second moment of the inputs in
domain d's text, and S the sum over all texts, free text and the ridge included.

``adapters.arithmetic`` has the methods that use the adapters' weights alone.

Shape legend: N rows, I inputs of a module, R rank of a domain's adapter.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gaisnet.adapters.arithmetic import side_by_side
from gaisnet.adapters.state import AdapterTensors
from gaisnet.config.learning import MergeSettings
from gaisnet.learning.regression import second_moments, solve_ridge
from gaisnet.models.ragged import Ragged

Trace = Callable[[str | None, int, Ragged], tuple[dict[str, Ragged], Ragged]]
"""Runs a layer with an adapter, or none, on its inputs: see ``learning.regression.trace_layer``."""


@torch.no_grad()
def merge_by_regression(
    adapters: Mapping[str, AdapterTensors],
    entering: Mapping[str, Ragged],
    free: Ragged,
    layers: Iterable[int],
    trace: Trace,
    settings: MergeSettings,
) -> AdapterTensors:
    """Merge adapters layer by layer, so that only one layer's moments are held.

    Args:
        adapters: By name, all of one shape.
        entering: Inputs of the first of ``layers`` in a domain's text, by the name of its adapter.
        free: The same in free text.
        layers: FM numbers of the layers that have adapters, in order.
        trace: Runs one of them.
        settings: Weights of free text and of the sum.
    """
    merged, states = side_by_side(list(adapters.values())), dict(entering)
    for layer in layers:
        seen: dict[str, dict[str, Ragged]] = {}
        for name in adapters:
            seen[name], states[name] = trace(name, layer, states[name])
        seen_free, free = trace(None, layer, free)
        for path, rows in seen_free.items():
            key = f"layers.{layer}.{path}.lora_A.weight"
            factors = [adapter[key] for adapter in adapters.values()]
            of_domains = [second_moments(seen[name].pop(path).later()) for name in adapters]
            merged[key] = filter_factors(factors, of_domains, second_moments(rows.later()), settings)
    return merged


def filter_factors(
    factors: Sequence[Tensor], seen: Sequence[Tensor], free_II: Tensor, settings: MergeSettings
) -> Tensor:
    """Filter each A [R, I], and stack the results.

    ``seen`` are second moments [I, I] in the text of each one's domain, ``free_II`` those in free text.
    """
    total_II = sum(seen, settings.free_text * free_II)
    ridge = settings.ridge * float(total_II.diagonal().mean())
    kept = [a.float() @ g_II + settings.weight * ridge * a.float() for a, g_II in zip(factors, seen, strict=True)]
    return solve_ridge(total_II, ridge, torch.cat(kept).T).T.contiguous()
