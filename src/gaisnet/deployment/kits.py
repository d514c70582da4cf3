"""Makes one kit per site: certificates by NVFlare's provisioning, addresses, configuration, a start script."""

import socket
from contextlib import ExitStack
from pathlib import Path

from gaisnet.checkpoint import writing
from gaisnet.config import Config
from gaisnet.data.devices import load_public_task
from gaisnet.deployment.site import CLOUD, Role, Site, write_site
from gaisnet.deployment.site_config import own_part
from gaisnet.engines.nvflare.provision import ADMIN, NetworkAddresses, SiteAddress, provision
from gaisnet.engines.sizes import check_sizes
from gaisnet.errors import OutputInUse
from gaisnet.models.families import family_of
from gaisnet.models.foundation import load_tokenizer, read_shape, reads_text, with_context
from gaisnet.tiers.split.layout import with_family_defaults

_NETWORK = "gaisnet"
_START = """#!/usr/bin/env bash
# Runs this site in the foreground and starts it again when it dies; stop it with Ctrl-C or SIGTERM.
# The command 'gaisnet' is the one that GAISNET names, or the first of these: on the PATH, in .venv in this folder or
# beside it, in ~/.local/bin. A service manager's PATH is short: give it GAISNET=/path/to/.venv/bin/gaisnet.
set -euo pipefail
kit="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -z "${GAISNET:-}" ]; then
  for found in "$(command -v gaisnet || true)" "$kit/.venv/bin/gaisnet" "$kit/../.venv/bin/gaisnet" \\
      "${HOME:-}/.local/bin/gaisnet"; do
    if [ -n "$found" ] && [ -x "$found" ]; then GAISNET="$found"; break; fi
  done
fi
if [ -z "${GAISNET:-}" ] || [ ! -x "$GAISNET" ]; then
  echo "start.sh: no command 'gaisnet' (GAISNET is '${GAISNET:-}', PATH is '$PATH'); set GAISNET to its full path" >&2
  exit 127
fi
echo "start.sh: $GAISNET runs the site in $kit; logs are in $kit/logs"
exec "$GAISNET" deploy start "$kit" "$@"
"""


def prepare(config: Config, out: Path) -> dict[str, Path]:
    """Write ``out/SITE`` for every site; ports that are 0 in the configuration become free ones of this machine.

    Returns:
        The kits by site name, the cloud first, then edges, then devices.

    Raises:
        OutputInUse: ``out`` holds something.
        OutputNotWritable: It is a file, or cannot be read.
        ProvisionFailed: NVFlare refused a name or could not write.
        ConfigError: The model's release does not fit ``wire.max_transfer_bytes``.
        GaisnetError: The foundation model's tokenizer cannot be loaded, or built-in data are missing.
    """
    with writing(out):
        if out.exists() and any(out.iterdir()):
            raise OutputInUse(out, "is not empty")
    for edge in config.edges:
        load_public_task(edge, config)  # a missing package is better met here than by every device
    check_sizes(config)
    tokenizer = load_tokenizer(config.model) if reads_text(config.model) else None
    # settled here for all sites: only the cloud has the model
    config = with_family_defaults(_with_ports(with_context(config)), family_of(read_shape(config.model)))
    made = provision(_addresses(config), out)
    made.pop(ADMIN).rename(made[CLOUD] / ADMIN)
    for name, folder in made.items():
        _finish(folder, Site(role=_role(config, name), name=name, config=own_part(config, name)))
    if tokenizer is not None:
        for _, device in config.each_device():
            tokenizer.save_pretrained(made[device.name] / "tokenizer")
    return made


def _role(config: Config, name: str) -> Role:
    if name == CLOUD:
        return "cloud"
    return "edge" if name in {edge.name for edge in config.edges} else "device"


def _addresses(config: Config) -> NetworkAddresses:
    return NetworkAddresses(
        name=_NETWORK,
        cloud=CLOUD,
        cloud_address=SiteAddress(config.cloud.host, config.cloud.link_port),
        nvflare_port=config.cloud.nvflare_port,
        edges={edge.name: SiteAddress(edge.host, edge.link_port) for edge in config.edges},
        devices=[device.name for _, device in config.each_device()],
    )


def _with_ports(config: Config) -> Config:
    """Return the configuration with a free port for every 0."""
    with ExitStack() as held:  # all at once, so that none is given out twice
        cloud = config.cloud.model_copy(
            update={
                "nvflare_port": config.cloud.nvflare_port or _free_port(held),
                "link_port": config.cloud.link_port or _free_port(held),
            }
        )
        edges = tuple(
            edge.model_copy(update={"link_port": edge.link_port or _free_port(held)}) for edge in config.edges
        )
    return config.model_copy(update={"cloud": cloud, "edges": edges})


def _free_port(held: ExitStack) -> int:
    one = held.enter_context(socket.socket())
    one.bind(("", 0))
    return int(one.getsockname()[1])


def _finish(folder: Path, site: Site) -> None:
    write_site(folder, site)
    start = folder / "start.sh"
    start.write_text(_START, encoding="utf-8")
    start.chmod(0o755)
