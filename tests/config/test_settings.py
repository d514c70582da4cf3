"""The configuration: what is refused, how the message names it, and what overrides do."""

import copy
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from gaisnet.config import Config, DeviceSettings
from gaisnet.config import settings as config_module
from gaisnet.config.file import load_config, parse_config
from gaisnet.config.learning import ModelSettings, Settings
from gaisnet.config.overrides import with_overrides
from gaisnet.errors import ConfigError, GaisnetError, UnknownKey

RAW: dict[str, Any] = {
    "seed": 3,
    "edges": [
        {
            "name": "hospital",
            "domain": "medical",
            "devices": [{"name": "ward-1", "head_layers": 2}, {"name": "ward-2", "mode": "local"}],
        },
        {"name": "office", "domain": "licences", "devices": [{"name": "desk", "data": "data/desk"}]},
    ],
}


@pytest.fixture
def raw() -> dict[str, Any]:
    return copy.deepcopy(RAW)


def parse(raw: dict[str, Any], *overrides: str) -> Config:
    return parse_config(with_overrides(raw, overrides))


def write(path: Path, raw: object) -> Path:
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


class TestDefaults:
    def test_what_is_left_out_has_a_default(self, raw: dict[str, Any]) -> None:
        config = parse(raw)
        assert config.seed == 3
        assert config.cycles == Config.model_fields["cycles"].default
        assert config.relay.enabled
        assert config.edges[0].devices[0].mode == "split"

    def test_each_device_keeps_the_order_of_the_file(self, raw: dict[str, Any]) -> None:
        pairs = [(edge.name, device.name) for edge, device in parse(raw).each_device()]
        assert pairs == [("hospital", "ward-1"), ("hospital", "ward-2"), ("office", "desk")]

    def test_settings_do_not_change(self, raw: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            parse(raw).seed = 4  # type: ignore[misc]

    def test_a_dump_reads_back_as_the_same_configuration(self, raw: dict[str, Any]) -> None:
        config = parse(raw, "domain.keep_layers=[0, 1, 28, 29]")
        assert parse_config(config.model_dump(mode="json")) == config


def settings_groups() -> list[type[Settings]]:
    found = [kind for kind in vars(config_module).values() if isinstance(kind, type) and issubclass(kind, Settings)]
    return [kind for kind in found if kind is not Settings]


@pytest.mark.parametrize("group", settings_groups(), ids=lambda group: group.__name__)
def test_every_field_is_documented_where_it_is_declared(group: type[Settings]) -> None:
    """A field that holds another group is documented by the docstring of that group."""
    for name, field in group.model_fields.items():
        held = (field.annotation, *typing.get_args(field.annotation))
        holds_group = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in held)
        assert field.description or holds_group, f"{group.__name__}.{name} has no description"


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "key", "nearest"),
        [
            ("sed=1", "sed", "seed"),
            ("edgs=[]", "edgs", "edges"),
            ("relya.enabled=false", "relya", "relay"),
            ("relay.enabeld=false", "relay.enabeld", "enabled"),
            ("finetune.batch_size=8", "finetune", "fine_tune"),
            ("fine_tune.batchsize=8", "fine_tune.batchsize", "batch_size"),
            ("domain.precison=int8", "domain.precison", "precision"),
            ("wire.smashd=int8", "wire.smashd", "smashed"),
            ("edges.0.devcies=[]", "edges.0.devcies", "devices"),
            ("edges.1.lables=[a]", "edges.1.lables", "labels"),
            ("edges.0.devices.1.headlayers=1", "edges.0.devices.1.headlayers", "head_layers"),
            ("edges.1.devices.0.moed=local", "edges.1.devices.0.moed", "mode"),
        ],
    )
    def test_named_with_its_place_and_the_nearest(
        self, raw: dict[str, Any], override: str, key: str, nearest: str
    ) -> None:
        with pytest.raises(UnknownKey) as caught:
            parse(raw, override)
        assert f"'{key}'" in str(caught.value)
        assert f"did you mean '{nearest}'?" in str(caught.value)

    def test_the_nearest_comes_from_the_same_group(self, raw: dict[str, Any]) -> None:
        """Here 'seed' would be near, but it is no key of a device."""
        with pytest.raises(UnknownKey, match="use one of: activations_to, data, head_layers, mode, name$"):
            parse(raw, "edges.0.devices.1.seed=1")

    def test_all_keys_are_listed_where_none_is_near(self, raw: dict[str, Any]) -> None:
        with pytest.raises(UnknownKey, match="'qqqqq': is not known; use one of: absorb, adapters, .*wire$"):
            parse(raw, "qqqqq=1")

    @pytest.mark.parametrize(
        ("place", "right", "wrong"),
        [((), "edges", "edgse"), (("edges", 0), "domain", "domian"), (("edges", 0, "devices", 1), "name", "nmae")],
    )
    def test_a_misspelt_key_that_is_required_is_named_not_reported_missing(
        self, raw: dict[str, Any], place: tuple[str | int, ...], right: str, wrong: str
    ) -> None:
        group: Any = raw
        for part in place:
            group = group[part]
        group[wrong] = group.pop(right)
        with pytest.raises(UnknownKey, match=f"'{'.'.join(map(str, (*place, wrong)))}'.*did you mean '{right}'"):
            parse(raw)

    def test_is_a_config_error_and_a_gaisnet_error(self) -> None:
        assert issubclass(UnknownKey, ConfigError)
        assert issubclass(ConfigError, GaisnetError)


class TestWrongValues:
    @pytest.mark.parametrize(
        ("override", "field", "found"),
        [
            ("seed=abc", "seed", "'abc'"),
            ("seed=-1", "seed", "-1"),
            ("cycles=0", "cycles", "0"),
            ("cycles=1.5", "cycles", "1.5"),
            ("relay=3", "relay", "3"),
            ("relay.enabled=perhaps", "relay.enabled", "'perhaps'"),
            ("relay.template_share=1.5", "relay.template_share", "1.5"),
            ("model.dtype=float8", "model.dtype", "'float8'"),
            ("model.device=", "model.device", "None"),
            ("adapters.targets=[]", "adapters.targets", "[]"),
            ("fine_tune.learning_rate=0", "fine_tune.learning_rate", "0"),
            ("fine_tune.learning_rate=.nan", "fine_tune.learning_rate", "nan"),
            ("absorb.max_retention_increase=.inf", "absorb.max_retention_increase", "inf"),
            ("edges=[]", "edges", "[]"),
            ("edges=medical", "edges", "'medical'"),
            ("edges.0.devices=[]", "edges.0.devices", "[]"),
            ("edges.0.domain=a/b", "edges.0.domain", "'a/b'"),
            ("edges.0.domain=..", "edges.0.domain", "'..'"),
            ("edges.0.devices.1=ward", "edges.0.devices.1", "'ward'"),
            ("edges.0.devices.1.head_layers=-1", "edges.0.devices.1.head_layers", "-1"),
            ("edges.0.devices.1.mode=lokal", "edges.0.devices.1.mode", "'lokal'"),
            ("domain.keep_layers=many", "domain.keep_layers", "'many'"),
            ("domain.keep_layers=[0, x]", "domain.keep_layers.1", "'x'"),
        ],
    )
    def test_the_field_and_the_value_are_named(
        self, raw: dict[str, Any], override: str, field: str, found: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            parse(raw, override)
        message = str(caught.value)
        assert message.startswith(f"configuration, {field}: ")
        assert f"(found {found})" in message

    def test_a_missing_field_is_named_without_printing_what_surrounds_it(self, raw: dict[str, Any]) -> None:
        del raw["edges"][0]["devices"][1]["name"]
        with pytest.raises(ConfigError) as caught:
            parse(raw)
        assert "configuration, edges.0.devices.1.name: Field required;" in str(caught.value)

    def test_a_long_value_is_shortened(self, raw: dict[str, Any]) -> None:
        raw["cycles"] = "9" * 1000 + "x"
        with pytest.raises(ConfigError) as caught:
            parse(raw)
        assert len(str(caught.value)) < 200

    def test_a_key_that_is_no_string(self, raw: dict[str, Any]) -> None:
        raw[1] = 2  # type: ignore[index]
        with pytest.raises(ConfigError, match="configuration, 1: Keys should be strings"):
            parse(raw)

    @pytest.mark.parametrize("template", ["no place for the text", "{text} twice {text}"])
    def test_a_template_holds_the_text_once(self, raw: dict[str, Any], template: str) -> None:
        raw["edges"][1]["template"] = template
        with pytest.raises(ConfigError, match=r"configuration, edges\.1: template must contain \{text\} exactly once;"):
            parse(raw)


class TestNames:
    @pytest.mark.parametrize(
        ("override", "repeated"),
        [
            ("edges.1.name=hospital", "hospital"),
            ("edges.1.devices.0.name=ward-1", "ward-1"),
            ("edges.0.devices.1.name=ward-1", "ward-1"),
            ("edges.1.devices.0.name=office", "office"),
        ],
    )
    def test_a_name_is_given_once_in_a_run(self, raw: dict[str, Any], override: str, repeated: str) -> None:
        with pytest.raises(ConfigError, match=f"names must be unique, but these are used twice: {repeated};"):
            parse(raw, override)

    def test_a_domain_is_served_by_one_edge(self, raw: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="a domain is named twice"):
            parse(raw, "edges.1.domain=medical")

    def test_a_newcomer_follows_a_domain_that_learns(self, raw: dict[str, Any]) -> None:
        config = parse(raw, "edges.1.follows=medical")
        assert [edge.domain for edge in config.learning_edges()] == ["medical"]
        assert [edge.adapter for edge in config.edges] == ["medical", "medical"]
        with pytest.raises(ConfigError, match="follows 'nobody', but the domains that learn are medical"):
            parse(raw, "edges.1.follows=nobody")
        with pytest.raises(ConfigError, match="the domains that learn are none: every edge follows another"):
            parse(raw, "edges.0.follows=medical", "edges.1.follows=medical")

    @pytest.mark.parametrize("taken", ["auto", "foundation", "merged"])
    def test_the_cloud_has_adapters_of_these_names_itself(self, raw: dict[str, Any], taken: str) -> None:
        with pytest.raises(ConfigError, match="a domain cannot be named auto or foundation or merged"):
            parse(raw, f"edges.1.domain={taken}")

    def test_a_name_is_at_most_64_characters(self, raw: dict[str, Any]) -> None:
        parse(raw, f"edges.0.name={'a' * 64}")
        with pytest.raises(ConfigError, match=r"edges\.0\.name"):
            parse(raw, f"edges.0.name={'a' * 65}")


class TestSeeds:
    def test_each_purpose_has_its_own(self, raw: dict[str, Any]) -> None:
        config = parse(raw)
        seeds = {config.seed_for("relay", domain, cycle) for domain in ("medical", "licences") for cycle in range(3)}
        assert len(seeds) == 6
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_it_depends_on_the_run_and_on_nothing_else(self, raw: dict[str, Any]) -> None:
        assert parse(raw).seed_for("text", 1) == parse(raw, "cycles=5").seed_for("text", 1)
        assert parse(raw).seed_for("text", 1) != parse(raw, "seed=4").seed_for("text", 1)

    def test_it_is_the_same_in_every_process(self, raw: dict[str, Any]) -> None:
        """Worked out apart: the first 8 bytes of sha256 of '3/text/1', as a big-endian number, halved."""
        assert parse(raw).seed_for("text", 1) == 2532733693795576438


class TestOverrides:
    def test_a_group_that_the_file_leaves_out(self, raw: dict[str, Any]) -> None:
        assert not parse(raw, "relay.enabled=false").relay.enabled

    def test_a_list_item_by_its_index(self, raw: dict[str, Any]) -> None:
        config = parse(raw, "edges.0.devices.1.head_layers=5", "edges.1.name=firm")
        assert config.edges[0].devices[1] == DeviceSettings(name="ward-2", mode="local", head_layers=5)
        assert config.edges[0].devices[0].head_layers == 2
        assert config.edges[1].name == "firm"

    def test_a_whole_list(self, raw: dict[str, Any]) -> None:
        assert parse(raw, "domain.keep_layers=[0, 1, 29]").domain.keep_layers == (0, 1, 29)

    @pytest.mark.parametrize(("text", "value"), [("5e-4", 0.0005), ("1", 1.0), ("2.5e-3", 0.0025)])
    def test_numbers_as_they_are_commonly_written(self, raw: dict[str, Any], text: str, value: float) -> None:
        """YAML 1.1 takes 5e-4, without a point, for a string."""
        assert parse(raw, f"fine_tune.learning_rate={text}").fine_tune.learning_rate == value

    def test_the_last_one_counts(self, raw: dict[str, Any]) -> None:
        assert parse(raw, "seed=1", "seed=2").seed == 2

    def test_a_value_may_hold_an_equals_sign(self, raw: dict[str, Any]) -> None:
        assert parse(raw, "edges.0.template=a={text}").edges[0].template == "a={text}"

    def test_what_is_given_stays_as_it_was(self, raw: dict[str, Any]) -> None:
        with_overrides(raw, ["edges.0.devices.1.head_layers=5", "relay.rank=2"])
        assert raw == RAW

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("relay.enabled", "not of the form key=value"),
            ("=3", "not of the form key=value"),
            ("edges.2.name=x", "'2' is no item of a list of 2"),
            ("edges.-1.name=x", "'-1' is no item of a list of 2"),
            ("edges.first.name=x", "'first' is no item of a list of 2"),
            ("edges.\u00b2.name=x", "'\u00b2' is no item of a list of 2"),
            ("edges.0.devices.2=x", "'2' is no item of a list of 2"),
            ("seed.deeper=1", "'seed' holds a value, not keys"),
            ("relay.enabled=[1", "is not YAML"),
            ("relay={rank: 1, rank: 2}", "is not YAML"),
        ],
    )
    def test_an_override_that_cannot_be_put_in(self, raw: dict[str, Any], override: str, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            with_overrides(raw, [override])
        assert str(caught.value).startswith(f"--set {override}: ")
        assert message in str(caught.value)


class TestLoad:
    def test_reads_the_file_and_puts_the_overrides_in(self, tmp_path: Path, raw: dict[str, Any]) -> None:
        config = load_config(write(tmp_path / "run.yaml", raw), ["seed=9"])
        assert config.seed == 9
        assert config.edges[0].domain == "medical"

    def test_a_data_folder_is_taken_from_the_folder_of_the_file(self, tmp_path: Path, raw: dict[str, Any]) -> None:
        path = write(tmp_path / "run.yaml", raw)
        desk = load_config(path).edges[1].devices[0]
        assert desk.data == tmp_path / "data" / "desk"
        assert load_config(path).edges[0].devices[0].data is None

    def test_a_relative_path_in_an_override_is_taken_from_the_current_directory(
        self, tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here" / "model").mkdir(parents=True)
        (tmp_path / "model").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        file = write(tmp_path / "run.yaml", raw)
        for override in ("edges.1.devices.0.data=mine", "edges.01.devices.0.data=mine"):
            assert load_config(file, [override]).edges[1].devices[0].data == tmp_path / "here" / "mine"
        devices = "edges.1.devices=[{name: desk, data: mine}]"
        assert load_config(file, [devices]).edges[1].devices[0].data == tmp_path / "here" / "mine"
        elsewhere = load_config(file, ["edges.1.name=sud", "model.context=32"]).edges[1].devices[0].data
        assert elsewhere == tmp_path / "data" / "desk"
        for given, found in (("model", "here/model"), ("../model", "model"), ("./model", "here/model")):
            assert load_config(file, [f"model.foundation={given}"]).model.foundation == str(tmp_path / found)

    @pytest.mark.parametrize("written", ["models/tiny", "./models/tiny", "~/site/models/tiny", "models/tiny.gguf"])
    def test_a_models_folder_is_taken_from_the_folder_of_the_file(
        self, tmp_path: Path, raw: dict[str, Any], written: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        site = tmp_path / "site"
        (site / "models" / "tiny").mkdir(parents=True)
        (site / "models" / "tiny.gguf").touch()
        raw["model"] = {"foundation": written, "public_inputs": "public.jsonl"}
        monkeypatch.chdir(tmp_path)
        model = load_config(write(site / "run.yaml", raw)).model
        assert model.foundation == str(site / "models" / Path(written).name)
        assert model.public_inputs == site / "public.jsonl"
        monkeypatch.chdir(site)
        assert load_config(Path("run.yaml")).model == model

    def test_a_file_that_is_a_link_as_in_the_hub_s_cache_keeps_its_name(
        self, tmp_path: Path, raw: dict[str, Any]
    ) -> None:
        (tmp_path / "blob").touch()
        (tmp_path / "tiny.gguf").symlink_to("blob")
        raw["model"] = {"foundation": "tiny.gguf"}
        assert load_config(write(tmp_path / "run.yaml", raw)).model.foundation == str(tmp_path / "tiny.gguf")

    @pytest.mark.parametrize("key", ["model.foundation", "model.public_inputs", "edges.0.devices.0.data"])
    def test_the_home_of_an_unknown_user_is_no_path(self, tmp_path: Path, raw: dict[str, Any], key: str) -> None:
        file = write(tmp_path / "run.yaml", raw)
        with pytest.raises(ConfigError, match=rf"{key} '~nobody-of-this-name/x': begins with '~'.*; write the whole"):
            load_config(file, [f"{key}=~nobody-of-this-name/x"])

    def test_a_hub_id_and_the_default_stay(
        self, tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / ModelSettings().foundation).mkdir()  # an output folder, say
        (tmp_path / "elsewhere" / "org" / "model").mkdir(parents=True)
        for asked in (ModelSettings().foundation, "org/model", ""):
            raw["model"] = {"foundation": asked}
            assert load_config(write(tmp_path / "run.yaml", raw)).model.foundation == asked
        raw["model"] = {"foundation": "org/model"}
        monkeypatch.chdir(tmp_path / "elsewhere")  # where transformers would take a folder for the hub id
        with pytest.raises(ConfigError, match=r"'org/model'.*current directory.*; write the path from.*--set"):
            load_config(write(tmp_path / "run.yaml", raw))
        given = ["model.foundation=org/model"]
        assert load_config(tmp_path / "run.yaml", given).model.foundation == str(Path("org/model").resolve())

    @pytest.mark.parametrize("written", ["./model", "../model", "/nowhere/model", "~/model", "weights.gguf"])
    def test_a_models_path_that_leads_nowhere_is_refused_before_anything_is_loaded(
        self, tmp_path: Path, raw: dict[str, Any], written: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        raw["model"] = {"foundation": written}
        with pytest.raises(ConfigError, match=rf"model\.foundation '{written}': there is no '/.*; correct it"):
            load_config(write(tmp_path / "run.yaml", raw))

    def test_an_absolute_data_folder_stays(self, tmp_path: Path, raw: dict[str, Any]) -> None:
        raw["edges"][1]["devices"][0]["data"] = str(tmp_path / "elsewhere")
        (tmp_path / "configs").mkdir()
        config = load_config(write(tmp_path / "configs" / "run.yaml", raw))
        assert config.edges[1].devices[0].data == tmp_path / "elsewhere"

    def test_an_error_names_the_file(self, tmp_path: Path, raw: dict[str, Any]) -> None:
        path = write(tmp_path / "run.yaml", raw | {"cycles": 0})
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"configuration '{path}', cycles: ")

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="there is no such file"):
            load_config(tmp_path / "none.yaml")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path)

    @pytest.mark.parametrize("text", ["", "- a\n- b\n", "word"])
    def test_no_mapping(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="is not a mapping of keys"):
            load_config(path)

    def test_not_yaml(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("edges: [", encoding="utf-8")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)

    def test_no_object_is_made_out_of_a_tag(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("seed: !!python/object/apply:os.getpid []\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)

    def test_a_key_given_twice_is_refused_with_its_line(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("relay:\n  rank: 4\n  enabled: false\n  rank: 8\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"the key 'rank' is given twice \(line 4, "):
            load_config(path)

    def test_a_merged_key_may_be_overridden(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(
            "edges:\n"
            "- name: one\n"
            "  domain: medical\n"
            "  devices: [&device {name: first, head_layers: 3}, {<<: *device, name: second}]\n",
            encoding="utf-8",
        )
        first, second = load_config(path).edges[0].devices
        assert (first.name, second.name) == ("first", "second")
        assert second.head_layers == 3


@pytest.mark.parametrize(
    ("epochs", "passes", "rounds"), [(1, 1, 1), (3, 3, 1), (2.0, 2, 1), (0.5, 1, 2), (0.333, 1, 3), (0.125, 1, 8)]
)
def test_an_edge_round_is_whole_passes_or_a_part_of_one(
    raw: dict[str, Any], epochs: float, passes: int, rounds: int
) -> None:
    raw["fine_tune"] = {"local_epochs": epochs, "edge_rounds": 2 * rounds}
    tune = parse_config(raw).fine_tune
    assert (tune.passes_in_round, tune.rounds_in_pass) == (passes, rounds)


@pytest.mark.parametrize("epochs", [1.5, 0.75, 0.3, 2.1, 150.5])
def test_parts_of_a_pass_are_equal(raw: dict[str, Any], epochs: float) -> None:
    raw["fine_tune"] = {"local_epochs": epochs}
    with pytest.raises(ConfigError, match="whole passes, or one of some equal parts of a pass"):
        parse_config(raw)


def test_a_cycle_has_whole_passes(raw: dict[str, Any]) -> None:
    raw["fine_tune"] = {"local_epochs": 0.25, "edge_rounds": 6}
    with pytest.raises(ConfigError, match="with local_epochs 0.25, edge_rounds is a multiple of 4, not 6"):
        parse_config(raw)


class TestFront:
    def test_the_endpoint_s_limits_are_settings_of_a_run(self, raw: dict[str, Any]) -> None:
        config = parse(raw, "front.max_answers=3", "front.cors_origins=[https://chat.example:8443, '*']")
        assert config.front.max_answers == 3
        assert config.front.cors_origins == ("https://chat.example:8443", "*")

    @pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/path", "https://a b", "null", "ftp://a"])
    def test_what_is_no_origin_is_refused(self, raw: dict[str, Any], origin: str) -> None:
        with pytest.raises(ConfigError, match="front.cors_origins"):
            parse({**raw, "front": {"cors_origins": [origin]}})
