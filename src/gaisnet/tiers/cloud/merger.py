"""Merges the adapters of all domains into one, in each configured way."""

from gaisnet.adapters.arithmetic import side_by_side, sparse_sum
from gaisnet.adapters.state import AdapterTensors
from gaisnet.config import Config
from gaisnet.config.learning import MergeMethod
from gaisnet.tiers.cloud.decoder_parts import DecoderParts
from gaisnet.tiers.cloud.synthetic_text import SyntheticText


class Merger:
    """Merges the adapters that are plugged into the FM.

    Args:
        parts: The FM.
        text: Text that the FM generated, for merging by regression.
        config: The run's configuration.
    """

    def __init__(self, parts: DecoderParts, text: SyntheticText, config: Config) -> None:
        self._parts = parts
        self._text = text
        self._config = config
        self._domains = [edge.domain for edge in config.learning_edges()]

    def merge_adapters(self) -> dict[str, AdapterTensors]:
        """Return one adapter made of all, by the way in which it was merged.

        A single domain's adapter needs no merging: the merged adapter is that adapter.
        """
        if len(self._domains) == 1:
            return {"the only one": self._parts.copy_adapter(self._domains[0])}
        return {way: self._merge_by(way) for way in self._config.absorb.merge.ways}

    def _merge_by(self, method: MergeMethod) -> AdapterTensors:
        settings, parts = self._config.absorb.merge, self._parts
        if method == "regression":
            entering = {domain: parts.at_suffix(self._text.get_or_generate(domain)) for domain in self._domains}
            return parts.merge_by_regression(entering, parts.at_suffix(self._text.free))
        adapters = [parts.copy_adapter(domain) for domain in self._domains]
        if method == "sum":
            return side_by_side(adapters, settings.weight)
        return sparse_sum(adapters, method, settings.weight, settings.density, self._config.seed_for("merge"))
