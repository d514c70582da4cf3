"""From a YAML file, or a plain dictionary, to a checked configuration; errors name the key, and the nearest known one.

``load_config`` is the only way in for files.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from gaisnet.config import Config, DeviceSettings
from gaisnet.errors import ConfigError, UnknownKey
from gaisnet.learning_settings import Settings
from gaisnet.overrides import found_in, most_telling, spelled_at, what_to_do, with_overrides
from gaisnet.yaml_text import load_yaml, problem, way_out


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` (YAML), apply ``key.sub=value`` overrides and check everything.

    Paths of data folders are taken from the folder of the file. Raises ``ConfigError``.
    """
    asked = f"configuration '{path}'"
    text = _text_of(path, asked)
    try:
        raw = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(asked, f"cannot be read ({problem(error)})", way_out(error)) from error
    if not isinstance(raw, dict):
        raise ConfigError(asked, "is not a mapping of keys", "see configs/demo.yaml")
    config = parse_config(with_overrides(raw, overrides), asked, text, overrides)
    return _resolve_data_folders(config, path.parent.resolve())


def _text_of(path: Path, asked: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(asked, "there is no such file", "name a YAML file; see configs/demo.yaml") from error
    except OSError as error:
        raise ConfigError(asked, f"cannot be read ({error})", "name a readable YAML file") from error
    except UnicodeDecodeError as error:
        found = f"cannot be read (byte {error.start} is not UTF-8)"
        raise ConfigError(asked, found, "save it as UTF-8") from error


def parse_config(
    raw: dict[str, Any], asked: str = "configuration", text: str = "", overrides: Sequence[str] = ()
) -> Config:
    """Check a plain dictionary. Raises ``UnknownKey`` or ``ConfigError`` with the field named.

    Args:
        raw: Names of settings to values.
        asked: Name of the whole in errors.
        text: YAML that it was read from, if any, so that errors show a value as it was written.
        overrides: As for ``load_config``; already in ``raw``.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = most_telling(error)
        where, group = _locate(first["loc"])
        if first["type"] == "extra_forbidden":
            known = list(group.model_fields)
            matches = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
            raise UnknownKey(where, matches[0] if matches else None, known) from error
        spelled = spelled_at(first["loc"], text, overrides)
        found, do = found_in(first, spelled), what_to_do(first, spelled)
        raise ConfigError(f"{asked}, {where or 'as a whole'}", found, do) from error


def _locate(location: Sequence[str | int]) -> tuple[str, type[Settings]]:
    """The dotted key at ``location``, and the group that its last name is, or should be, a field of.

    Below a field that is no group, pydantic puts in the names of a union's members; they are left out.
    """
    names: list[str] = []
    group: type[Settings] = Config
    inner: type[Settings] | None = Config
    for part in location:
        if isinstance(part, int):
            names.append(str(part))
        elif inner is not None:
            names.append(part)
            group = inner
            inner = _settings_in(group.model_fields[part].annotation) if part in group.model_fields else None
    return ".".join(names), group


def _settings_in(annotation: Any) -> type[Settings] | None:
    """The group of settings that a field holds, alone or in a tuple."""
    held = (annotation, *get_args(annotation))
    return next((kind for kind in held if isinstance(kind, type) and issubclass(kind, Settings)), None)


def _resolve_data_folders(config: Config, base: Path) -> Config:
    def resolved(device: DeviceSettings) -> DeviceSettings:
        return device if device.data is None else device.model_copy(update={"data": base / device.data})

    edges = tuple(edge.model_copy(update={"devices": tuple(map(resolved, edge.devices))}) for edge in config.edges)
    public = config.model.public_inputs
    model = config.model.model_copy(update={"public_inputs": None if public is None else base / public})
    return config.model_copy(update={"edges": edges, "model": model})
