"""Settings of a run. ``config.file.load_config`` reads and checks them."""

from gaisnet.config.infrastructure import (
    CloudSettings,
    FaultSettings,
    FrontSettings,
    RoutingSettings,
    ServiceSettings,
    TensorCode,
    WireSettings,
)
from gaisnet.config.settings import (
    Config,
    DataSettings,
    DealtShare,
    DevicePrecision,
    DeviceSettings,
    EdgeSettings,
    Elsewhere,
)

__all__ = [
    "CloudSettings",
    "Config",
    "DataSettings",
    "DealtShare",
    "DevicePrecision",
    "DeviceSettings",
    "EdgeSettings",
    "Elsewhere",
    "FaultSettings",
    "FrontSettings",
    "RoutingSettings",
    "ServiceSettings",
    "TensorCode",
    "WireSettings",
]
