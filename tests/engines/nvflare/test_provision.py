import json
import ssl
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.security.security import COMMAND_CATEGORIES, FLAuthorizer

from gaisnet.engines.nvflare.kit import SEALS, client_command, read_kit, read_seal, server_command
from gaisnet.engines.nvflare.provision import ADMIN, NetworkAddresses, SiteAddress, provision
from gaisnet.errors import ConfigError, KitUnreadable, OutputInUse, ProvisionFailed

NETWORK = NetworkAddresses(
    name="net-1",
    cloud="cloud",
    cloud_address=SiteAddress("cloud.example", 9000),
    nvflare_port=8002,
    edges={"edge_1": SiteAddress("10.0.0.1", 9001), "edge-2": SiteAddress("10.0.0.2", 9002)},
    devices=["device11", "device21"],
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kits")


@pytest.fixture(scope="module")
def kits(out: Path) -> dict[str, Path]:
    return provision(NETWORK, out)


def names_in(certificate: Path) -> tuple[str, set[str]]:
    """Common name and alternative DNS names."""
    read = x509.load_pem_x509_certificate(certificate.read_bytes())
    (name,) = read.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    san = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return str(name.value), set(san.get_values_for_type(x509.DNSName))


def test_each_site_gets_a_folder(kits: dict[str, Path], out: Path) -> None:
    assert kits == {name: out / name for name in ["cloud", "edge_1", "edge-2", "device11", "device21", ADMIN]}
    assert {path.name for path in out.iterdir()} == {*kits, "authority"}


def test_a_device_gets_certificates_only(kits: dict[str, Path]) -> None:
    assert {path.name for path in kits["device11"].iterdir()} == {"client.crt", "client.key", "rootCA.pem"}
    assert names_in(kits["device11"] / "client.crt") == ("device11", {"device11"})


@pytest.mark.parametrize(("site", "port"), [("cloud", 9000), ("edge_1", 9001), ("edge-2", 9002)])
def test_a_site_can_listen_under_its_name(kits: dict[str, Path], site: str, port: int) -> None:
    kit = read_kit(kits[site])
    assert (kit.site, kit.link_port) == (site, port)
    name, alternatives = names_in(kit.certificate)
    assert name == site
    assert site in alternatives
    context = ssl.create_default_context(cafile=str(kit.root))
    context.load_cert_chain(kit.certificate, kit.key)


def test_private_keys_are_for_their_owner_only(kits: dict[str, Path], out: Path) -> None:
    secret = [*out.rglob("*.key"), *out.rglob("cert.json")]
    assert len(secret) == len(kits) + 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}
    assert stat.S_IMODE((out / "authority").stat().st_mode) == 0o700
    assert {stat.S_IMODE(kit.stat().st_mode) for kit in kits.values()} == {0o700}


def test_the_cloud_shares_a_seal_with_each_edge_and_no_edge_has_that_of_another(kits: dict[str, Path]) -> None:
    seals = {edge: read_seal(kits["cloud"], edge) for edge in NETWORK.edges}
    assert {edge: read_seal(kits[edge], edge) for edge in NETWORK.edges} == seals
    assert len(set(seals.values())) == 2
    for folder, names in (("cloud", {"edge_1", "edge-2"}), ("edge_1", {"edge_1"}), ("edge-2", {"edge-2"})):
        assert {path.name for path in (kits[folder] / SEALS).iterdir()} == names
    assert not (kits["device11"] / SEALS).exists()
    assert not (kits[ADMIN] / SEALS).exists()


def test_seals_are_for_their_owner_only(kits: dict[str, Path], out: Path) -> None:
    folders = [*(kits[name] / SEALS for name in ("cloud", "edge_1", "edge-2")), out / "authority" / ".seals"]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert {stat.S_IMODE(file.stat().st_mode) for folder in folders for file in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("content", [None, "", "ab", "x" * 64, "é" * 32, "ab" * 33])
def test_a_seal_that_cannot_be_read_is_not_shown(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / SEALS).mkdir(parents=True)
        (tmp_path / SEALS / "edge").write_text(content, encoding="utf-8")
    with pytest.raises(KitUnreadable, match="'local/seals/edge' is missing, or is not 32 bytes") as caught:
        read_seal(tmp_path, "edge")
    assert caught.value.__context__ is None


def test_keys_are_closed_before_the_kits_leave_the_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_keys: list[Path] = []

    def rename(source: Path, target: Path) -> None:
        keys = [source] if source.suffix == ".key" else source.rglob("*.key")
        open_keys.extend(key for key in keys if stat.S_IMODE(key.stat().st_mode) != 0o600)
        source.replace(target)

    monkeypatch.setattr(Path, "rename", rename)
    provision(NETWORK, tmp_path)
    assert open_keys == []


def test_nvflare_keeps_to_the_kit_and_runs_our_classes(kits: dict[str, Path]) -> None:
    server = json.loads((kits["cloud"] / "local" / "resources.json").read_text())
    client = json.loads((kits["edge_1"] / "local" / "resources.json").read_text())
    assert "/tmp" not in json.dumps(server) + json.dumps(client)
    assert server["class_allow_list"] == ["gaisnet.engines.nvflare.bridge.CloudBridge"]
    assert client["class_allow_list"] == ["gaisnet.engines.nvflare.bridge.EdgeBridge"]
    assert server["servers"][0]["heart_beat_timeout"] == 30
    assert {component["id"] for component in server["components"]} >= {"job_store", "job_manager", "rejoin"}
    (rejoin,) = (component for component in server["components"] if component["id"] == "rejoin")
    assert rejoin["args"] == {"edges": ["edge_1", "edge-2"]}


USED = {"check_status", "list_jobs", "get_job_meta", "submit_job", "abort_job"}
"""Rights that the administrator's session needs, the submission at edges among them."""


@pytest.mark.parametrize("site", ["cloud", "edge_1", "edge-2"])
def test_a_policy_grants_what_the_job_needs_and_nothing_else(kits: dict[str, Path], site: str) -> None:
    policy = json.loads((kits[site] / "local" / "authorization.json").read_text())
    authorizer = FLAuthorizer("gaisnet", policy)
    rights = {*COMMAND_CATEGORIES, *COMMAND_CATEGORIES.values(), *USED, "byoc", "clone_job", "server-predeployed-flwr"}
    for role in ("project_admin", "org_admin", "lead", "member", ""):
        asked = {right: AuthzContext(right, Person("admin", "gaisnet", role)) for right in rights}
        granted = {right for right, context in asked.items() if authorizer.authorize(context)[0]}
        assert granted == (USED if role == "project_admin" else set())


def test_logs_of_nvflare_go_where_they_are_kept_small(kits: dict[str, Path]) -> None:
    for site in ("cloud", "edge_1"):
        settings = json.loads((kits[site] / "local" / "log_config.json").read_text())
        assert "filename" not in json.dumps(settings)
        components = json.loads((kits[site] / "local" / "resources.json").read_text())["components"]
        assert "site_log_streamer" not in {component["id"] for component in components}


def test_certificates_are_valid_from_a_day_before_since_clocks_lag(kits: dict[str, Path]) -> None:
    now = datetime.now(UTC)
    for file in [*kits["cloud"].rglob("*.crt"), *kits["device11"].rglob("*.crt"), kits["device11"] / "rootCA.pem"]:
        read = x509.load_pem_x509_certificate(file.read_bytes())
        assert timedelta(hours=23) < now - read.not_valid_before_utc < timedelta(hours=25)
        assert read.not_valid_after_utc - now > timedelta(days=358)


def test_edges_dial_the_cloud_with_mutual_tls(kits: dict[str, Path]) -> None:
    declared = json.loads((kits["edge_1"] / "startup" / "fed_client.json").read_text())
    assert declared["servers"][0]["service"] == {"target": "cloud.example:8002", "scheme": "tcp"}
    assert declared["client"]["connection_security"] == "mtls"


def test_commands(kits: dict[str, Path]) -> None:
    server, client = server_command(kits["cloud"]), client_command(kits["edge_1"], "edge_1")
    assert server[0] == client[0] == sys.executable
    assert str(kits["cloud"].resolve()) in server
    assert "uid=edge_1" in client
    assert client[3:5] == ["gaisnet.engines.nvflare.narrowed", "nvflare.private.fed.app.client.client_train"]


def test_a_path_that_nvflare_would_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="NVFlare cannot start jobs from it"):
        server_command(tmp_path / "two words")
    with pytest.raises(ConfigError, match="plain characters"):
        client_command(tmp_path / "it's", "edge")


def test_kits_are_not_overwritten(kits: dict[str, Path], out: Path) -> None:
    with pytest.raises(OutputInUse, match="cloud"):
        provision(NETWORK, out)


def test_the_same_authority_makes_more_kits(tmp_path: Path) -> None:
    first = provision(NETWORK, tmp_path)
    root, certificate = ((first["device11"] / name).read_bytes() for name in ("rootCA.pem", "client.crt"))
    for name, folder in first.items():
        folder.rename(tmp_path / f"old-{name}")
    second = provision(replace(NETWORK, devices=["device11", "device12"]), tmp_path)
    assert (second["device12"] / "rootCA.pem").read_bytes() == root
    assert (second["device11"] / "client.crt").read_bytes() == certificate
    # An edge may keep its old kit.
    assert read_seal(second["cloud"], "edge_1") == read_seal(tmp_path / "old-edge_1", "edge_1")


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (replace(NETWORK, devices=["edge_1"]), "edge_1"),
        (replace(NETWORK, devices=[ADMIN]), ADMIN),
        (replace(NETWORK, devices=["server"]), "server"),
        (replace(NETWORK, devices=["no spaces"]), "ill-formatted"),
        (replace(NETWORK, cloud="cloud_1"), "ill-formatted"),
        (replace(NETWORK, devices=["../up"]), "ill-formatted"),
    ],
)
def test_names_that_cannot_be_used(network: NetworkAddresses, found: str, tmp_path: Path) -> None:
    with pytest.raises(ProvisionFailed, match=found):
        provision(network, tmp_path)


def test_an_error_that_nvflare_swallows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "authority" / NETWORK.name / "state"
    state.mkdir(parents=True)
    (state / "cert.json").write_text("{")
    with pytest.raises(ProvisionFailed, match="NVFlare says"):
        provision(NETWORK, tmp_path)
    assert "Traceback" not in capfd.readouterr().err


def test_a_folder_that_is_no_kit(tmp_path: Path) -> None:
    with pytest.raises(KitUnreadable, match=r"gaisnet\.json"):
        read_kit(tmp_path)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "gaisnet.json").write_text('{"site": "edge", "link_port": "9"}')
    with pytest.raises(KitUnreadable, match="holds"):
        read_kit(tmp_path)
    (tmp_path / "local" / "gaisnet.json").write_text('{"site": "edge", "link_port": 9}')
    with pytest.raises(KitUnreadable, match="rootCA.pem' is missing"):
        read_kit(tmp_path)


@pytest.mark.parametrize(
    "module", ["bridge", "server_parts", "edge_parts", "narrowed", "job_session", "job", "kit", "seal"]
)
def test_what_runs_beside_nvflare_imports_no_torch(module: str) -> None:
    code = f"import gaisnet.engines.nvflare.{module}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
