"""Reads a configuration from a YAML file or a plain dictionary; errors name the key, and the nearest known one.

``load_config`` is the only way to read files.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from gaisnet.config import Config, EdgeSettings
from gaisnet.config.learning import ModelSettings, Settings
from gaisnet.config.overrides import found_in, is_set_by, most_telling, spelled_at, what_to_do, with_overrides
from gaisnet.config.yaml_text import load_yaml, problem, way_out
from gaisnet.errors import ConfigError, UnknownKey


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` (YAML), apply ``key.sub=value`` overrides and check everything.

    Paths become absolute: those in the file are taken from the folder of the file, those in an override from the
    current directory. Raises ``ConfigError``.
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
    return with_absolute_paths(config, overrides, path.parent.resolve())


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
    """Return the dotted key at ``location``, and the group that its last name is, or should be, a field of.

    Below a field that is no group, pydantic inserts the names of a union's members; they are left out.
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
    """Return the group of settings that a field holds, alone or in a tuple."""
    held = (annotation, *get_args(annotation))
    return next((kind for kind in held if isinstance(kind, type) and issubclass(kind, Settings)), None)


def with_absolute_paths(config: Config, overrides: Sequence[str], base: Path | None = None) -> Config:
    """Make every path absolute, and expand ``~``.

    Args:
        config: After the overrides.
        overrides: ``key=value``; paths in them are relative to the current directory.
        base: Folder that the other paths are relative to; None if they are absolute.

    Raises:
        ConfigError: ``model.foundation`` is written as a path that does not exist; or it is not, but a folder of the
            current directory would be mistaken for it; or a path begins with '~' and an unknown user.
    """

    def base_of(key: str) -> Path | None:
        return Path.cwd() if is_set_by(overrides, key) else base

    def resolved(path: Path | None, key: str) -> Path | None:
        folder = base_of(key)
        return path if path is None or folder is None else folder / _at_home(path, key)

    def edge(number: int, settings: EdgeSettings) -> EdgeSettings:
        devices = (
            device.model_copy(update={"data": resolved(device.data, f"edges.{number}.devices.{i}.data")})
            for i, device in enumerate(settings.devices)
        )
        return settings.model_copy(update={"devices": tuple(devices)})

    model = {
        "foundation": _foundation(config.model.foundation, base_of("model.foundation")),
        "public_inputs": resolved(config.model.public_inputs, "model.public_inputs"),
    }
    edges = tuple(edge(number, settings) for number, settings in enumerate(config.edges))
    return config.model_copy(update={"model": config.model.model_copy(update=model), "edges": edges})


def _foundation(asked: str, base: Path | None) -> str:
    """Return a model's folder or file as an absolute path; a hub id, or the default, unchanged."""
    if asked in ("", ModelSettings.model_fields["foundation"].default):
        return asked
    path = _at_home(Path(asked), "model.foundation")
    if base is not None and (_is_path(asked) or (base / path).is_dir()):
        found = base / path
        if not found.exists():
            do = f"correct it: it is taken from '{base}'; a hub id is written without a dot or slash in front"
            raise ConfigError(f"model.foundation '{asked}'", f"there is no '{found}'", do)
        # The file's own name stays where it is a link: the hub's cache has it as a link to a file without an ending.
        return str(found.resolve() if found.is_dir() else found.parent.resolve() / found.name)
    if not path.is_absolute() and path.is_dir():  # transformers would load it, and later another or none
        found_here = f"is not in the folder of the configuration, but in the current directory, '{Path.cwd()}'"
        do = f"write the path from the configuration's folder, or --set model.foundation={asked}"
        raise ConfigError(f"model.foundation '{asked}'", found_here, do)
    return asked


def _at_home(path: Path, key: str) -> Path:
    """Expand ``~``. Raises ``ConfigError`` if there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        do = f"write the whole path, or './{path}' for a folder of this name"
        raise ConfigError(f"{key} '{path}'", "begins with '~', and that user has no home folder here", do) from error


def _is_path(text: str) -> bool:
    """Return whether a value is written as a path, and cannot be a hub id."""
    return text.startswith((".", "/", "~")) or text.endswith(".gguf")
