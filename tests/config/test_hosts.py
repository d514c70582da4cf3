import re

import pytest

from gaisnet.config import Config
from gaisnet.config.file import parse_config
from gaisnet.config.hosts import address, every_address
from gaisnet.errors import ConfigError
from tests.tiny import tiny_edge, tiny_raw_config


def with_hosts(cloud: str = "localhost", edge: str = "localhost") -> Config:
    return parse_config(tiny_raw_config(cloud={"host": cloud}, edges=[{**tiny_edge("north", "shapes"), "host": edge}]))


@pytest.mark.parametrize(
    ("written", "host", "reached"),
    [
        ("::1", "::1", "[::1]:9"),
        ("[2001:db8::7]", "2001:db8::7", "[2001:db8::7]:9"),
        ("10.0.0.1", "10.0.0.1", "10.0.0.1:9"),
        ("Edge.Example.ORG", "Edge.Example.ORG", "Edge.Example.ORG:9"),
        ("gpu_server_1", "gpu_server_1", "gpu_server_1:9"),
        ("xn--mnchen-3ya.example", "xn--mnchen-3ya.example", "xn--mnchen-3ya.example:9"),
        ("edge.example.", "edge.example.", "edge.example.:9"),
    ],
)
def test_a_host_is_an_address_or_a_name_and_ipv6_gets_brackets_before_a_port(
    written: str, host: str, reached: str
) -> None:
    read = with_hosts(edge=written).edges[0].host
    assert read == host
    assert address(read, 9) == reached
    assert every_address(read, 9) == ("[::]:9" if ":" in host else "0.0.0.0:9")


NO_HOSTS = {
    "": "it is empty; write a DNS name",
    " ": "it is empty; write a DNS name",
    "https://host.example.org": "is a URL, not a host; write the host alone, such as 'host.example.org'",
    "http://[2001:db8::1]/": r"is a URL, not a host; write the host alone, such as '[2001:db8::1]'",
    "http://host.example.org:80/x": "such as 'host.example.org'",
    "host.example.org:8004": "has a port; write 'host.example.org', and the port as link_port",
    "[::1]:8004": "has a port; write '[::1]', and the port as link_port",
    " host.example": "has blanks around it; write 'host.example'",
    "münchen.example": "is not ASCII",
    "*.example.org": "is no DNS name and no IP address",
    "a" * 64 + ".example": "is no DNS name and no IP address",
    "a." * 127 + "example": "is no DNS name and no IP address",
    "host/path": "is no DNS name and no IP address",
    "-host": "is no DNS name and no IP address",
    "300.1.1.1": "is no DNS name and no IP address",
    "0.0.0.0": "is no address of one host",
    "::": "is no address of one host",
    "fe80::1%eth0": "means another interface on every host",
    "[host.example]": "is no DNS name and no IP address",
    "[::1": "is no DNS name and no IP address",
}


@pytest.mark.parametrize("written", NO_HOSTS)
@pytest.mark.parametrize("whose", ["cloud", "edge"])
def test_anything_else_is_refused_with_the_setting_and_what_to_write(written: str, whose: str) -> None:
    setting = {"cloud": "cloud.host", "edge": "edges.0.host"}[whose]
    with pytest.raises(ConfigError, match=f"{setting}: .*{re.escape(NO_HOSTS[written])}"):
        with_hosts(**{whose: written})


@pytest.mark.parametrize("written", ["::1", "[::1]", "gpu_server_1", "cloud.example."])
def test_a_host_of_the_cloud_that_nvflare_cannot_use_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match=r"cloud\.host: .*NVFlare (cannot connect|refuses)"):
        with_hosts(cloud=written)


def with_ports(nvflare: int, cloud: int, north: int, south: int, south_host: str = "localhost") -> Config:
    edges = [
        {**tiny_edge("north", "shapes"), "link_port": north},
        {**tiny_edge("south", "tastes"), "link_port": south, "host": south_host},
    ]
    return parse_config(tiny_raw_config(cloud={"nvflare_port": nvflare, "link_port": cloud}, edges=edges))


@pytest.mark.parametrize(
    ("ports", "settings"),
    [
        ((8002, 8002, 0, 0), "cloud.nvflare_port and cloud.link_port"),
        ((8002, 8003, 8002, 0), "cloud.nvflare_port and link_port of edge 'north'"),
        ((8002, 8003, 8004, 8003), "cloud.link_port and link_port of edge 'south'"),
        ((8002, 8003, 8004, 8004), "link_port of edge 'north' and link_port of edge 'south'"),
    ],
)
def test_two_listeners_of_a_host_cannot_have_one_port(ports: tuple[int, int, int, int], settings: str) -> None:
    with pytest.raises(ConfigError, match=f"{settings} are both .* on host 'localhost'; give each a port of its own"):
        with_ports(*ports)


def test_free_ports_and_ports_of_other_hosts_may_be_equal() -> None:
    with_ports(0, 0, 0, 0)
    with_ports(8002, 8003, 8004, 8004, south_host="south.example")
