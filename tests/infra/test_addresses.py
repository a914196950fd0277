"""Hosts have one spelling, and addresses that a stranger's URL must not reach are known in all their disguises."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from infra.addresses import read_host, reason_to_refuse, resolve, system_resolver
from infra.errors import FetchFailed, UrlRefused
from tests.web_server import Names


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",  # 127.0.0.1 as one decimal number
        "0x7f000001",
        "0x7f.0.0.1",
        "0x7F.1",
        "017700000001",
        "0177.0.0.1",
        "127.1",
        "127.0.1",
        "127.0.0.01",
        "127.0.0.1.",
        "1.2.3.4.5",
        "256.1.1.1",
        "foo.0x1",
        "localhost.",
        "localhost..",
        "films.example.",
        "１２７.0.0.1",  # full width digits
        "127。0。0。1",  # ideographic full stops
        "①②⑦.0.0.1",
        "ⓛocalhost",
        "müller.example",
        "127.0.0.1%00.films.example",
        "%31%32%37.0.0.1",
        "films.example\\@127.0.0.1",
        "films example",
        "-films.example",
        "films..example",
        "a" * 64 + ".example",
        "[::1%lo]",
        "[::1%25lo]",
        "[fe80::1%eth0]",
        "[::1",
        "[]",
        "[127.0.0.1]",
        "",
    ],
)
def test_unusual_spellings_are_refused(host: str) -> None:
    with pytest.raises(UrlRefused) as caught:
        read_host(host)
    assert caught.value.code == "url-host" and caught.value.remedy


def test_usual_spellings_become_one() -> None:
    assert read_host("Films.Example") == "films.example"
    assert read_host("xn--mller-kva.example") == "xn--mller-kva.example"
    assert read_host("8.8.8.8") == "8.8.8.8"
    assert read_host("[2606:4700:0:0::1111]") == "2606:4700::1111"
    assert read_host("cam_1") == "cam_1"
    assert read_host("0x.example") == "0x.example"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("127.0.0.1", "loopback"),
        ("127.255.0.9", "loopback"),
        ("169.254.169.254", "metadata"),
        ("169.254.1.1", "link-local"),
        ("168.63.129.16", "metadata"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "provider"),
        ("100.127.255.255", "provider"),
        ("192.0.0.8", "reserved"),
        ("198.18.0.1", "reserved"),
        ("203.0.113.7", "reserved"),
        ("192.88.99.1", "tunnel"),
        ("224.0.0.1", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("fe80::1", "link-local"),
        ("fe80::1%2", "link-local"),
        ("fc00::1", "private"),
        ("fd00:ec2::254", "metadata"),
        ("fec0::1", "private"),
        ("ff02::1", "multicast"),
        ("::ffff:127.0.0.1", "IPv4"),
        ("::ffff:8.8.8.8", "IPv4"),
        ("::127.0.0.1", "IPv4"),
        ("::ffff:0:127.0.0.1", "IPv4"),
        ("64:ff9b::7f00:1", "translated"),
        ("64:ff9b::a9fe:a9fe", "translated"),
        ("64:ff9b:1::7f00:1", "tunnel"),
        ("2002:7f00:1::", "tunnel"),
        ("2001:0:7f00:1::", "tunnel"),
        ("2001:db8::1", "reserved"),
        ("3fff::1", "reserved"),
        ("2606:4700::5efe:7f00:1", "tunnel"),
        ("4000::1", "reserved"),
        ("100::1", "reserved"),
    ],
)
def test_special_addresses_are_refused(address: str, reason: str) -> None:
    found = reason_to_refuse(ipaddress.ip_address(address))
    assert found is not None and reason in found


@pytest.mark.parametrize("address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_not(address: str) -> None:
    assert reason_to_refuse(ipaddress.ip_address(address)) is None


def test_an_allowed_network_opens_itself_alone() -> None:
    lan = (ipaddress.ip_network("192.168.20.0/24"), ipaddress.ip_network("fd00::/8"))
    assert reason_to_refuse(ipaddress.ip_address("192.168.20.9"), lan) is None
    assert reason_to_refuse(ipaddress.ip_address("fd12::1"), lan) is None
    for address in ("192.168.21.9", "127.0.0.1", "::ffff:192.168.20.9", "64:ff9b::c0a8:1409", "fd00:ec2::254"):
        assert reason_to_refuse(ipaddress.ip_address(address), lan), address
    everything = (ipaddress.ip_network("0.0.0.0/0"),)
    assert reason_to_refuse(ipaddress.ip_address("10.1.1.1"), everything) is None
    assert reason_to_refuse(ipaddress.ip_address("169.254.169.254"), everything)


@pytest.mark.parametrize("answer", [["10.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["2606:4700::1111", "::1"]])
def test_one_bad_address_of_several_is_enough(answer: list[str]) -> None:
    names = Names({"films.example": [answer]})
    with pytest.raises(UrlRefused, match=r"films\.example") as caught:
        resolve("films.example", (), names)
    assert caught.value.code == "url-address"
    assert not any(address in str(caught.value) for address in answer), "what a name resolves to inside is not told"


def test_numbers_are_not_looked_up() -> None:
    names = Names({})
    assert resolve("8.8.8.8", (), names) == ("8.8.8.8",)
    with pytest.raises(UrlRefused):
        resolve("::1", (), names)
    assert names.asked == []


def test_names_without_an_address() -> None:
    def unknown(name: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def unreachable(name: str) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    for resolver, is_transient in ((unknown, False), (unreachable, True), (lambda name: [], False)):
        with pytest.raises(FetchFailed) as caught:
            resolve("films.example", (), resolver)
        assert caught.value.code == "fetch-dns" and caught.value.is_transient is is_transient


def test_the_system_resolves() -> None:
    assert set(system_resolver("localhost")) <= {"127.0.0.1", "::1"} and system_resolver("localhost")
    with pytest.raises(UrlRefused):
        resolve("localhost", (), system_resolver)
