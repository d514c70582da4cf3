"""The part of a network's configuration for one site's kit: its own, and what it needs to know of others.

A device knows its edge, and not its neighbours. An edge knows its devices and the cloud, and no other edge. The cloud
knows all edges and devices, but not where data lie. Facts that depend on the whole network, such as the
deepest device head or a device's share of a built-in data set, are included as numbers (``config.Elsewhere``).
"""

from gaisnet.config import CloudSettings, Config, EdgeSettings, Elsewhere
from gaisnet.data.devices import dealt_share
from gaisnet.deployment.site import CLOUD

_AT_THE_CLOUD = "at the cloud"  # in place of the foundation model's name or path


def own_part(config: Config, site: str) -> Config:
    """Cut ``config`` down to the part for the kit of ``site``, which it names."""
    if site == CLOUD:
        edges = tuple(_without_data(edge) for edge in config.edges)
        own_data = tuple(edge.name for edge in config.edges if not config.deals(edge))
        return config.model_copy(update={"edges": edges, "elsewhere": _elsewhere(config, own_data=own_data)})
    hidden = config.model.model_copy(update={"foundation": _AT_THE_CLOUD, "public_inputs": None})
    faults = config.faults.model_copy(update={"min_edges": 1})  # the cloud's to count: there is one edge in this part
    update: dict[str, object] = {"model": hidden, "faults": faults}
    for edge in config.edges:
        if edge.name == site:
            edges = (_without_data(_completed(edge, config)),)
            elsewhere = _elsewhere(config, own_data=() if config.deals(edge) else (site,))
            return config.model_copy(update={**update, "edges": edges, "elsewhere": elsewhere})
    edge, device = next((edge, device) for edge, device in config.each_device() if device.name == site)
    own = _completed(edge, config).model_copy(update={"devices": (device,)})
    elsewhere = _elsewhere(config, share=dealt_share(edge, site, config))
    return config.model_copy(update={**update, "cloud": CloudSettings(), "edges": (own,), "elsewhere": elsewhere})


def _elsewhere(config: Config, **more: object) -> Elsewhere:
    first, last = config.cuts
    numbers = {"first_cut": first, "last_cut": last, "num_learning": config.num_learning}
    return Elsewhere.model_validate({**numbers, **more})


def _without_data(edge: EdgeSettings) -> EdgeSettings:
    devices = tuple(device.model_copy(update={"data": None}) for device in edge.devices)
    return edge.model_copy(update={"devices": devices})


def _completed(edge: EdgeSettings, config: Config) -> EdgeSettings:
    """Complete a newcomer's task from the edge that it follows."""
    followed = next(each for each in config.edges if each.domain == edge.adapter)
    template, labels = edge.template or followed.template, edge.labels or followed.labels
    return edge.model_copy(update={"template": template, "labels": labels})
