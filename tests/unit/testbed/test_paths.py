"""Names and addresses of a testbed follow from its name and index alone."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit_testbed import network
from godwit_testbed.paths import Place, TestbedError


@given(st.integers(0, 99), st.integers(0, 99))
def test_testbeds_share_no_address(one: int, other: int) -> None:
    if one == other:
        return
    nets = [ipaddress.ip_network(f"{Place('a', index).network}.0.0/16") for index in (one, other)]
    assert not nets[0].overlaps(nets[1])


@given(st.integers(0, 99))
def test_ranges_of_one_testbed_do_not_overlap(index: int) -> None:
    place = Place("a", index)
    pods = ipaddress.ip_network(place.pod_cidr)
    services = ipaddress.ip_network(place.service_cidr)
    nodes = ipaddress.ip_network(f"{place.network}.0.0/24")
    assert not pods.overlaps(services)
    assert not pods.overlaps(nodes)
    assert not services.overlaps(nodes)
    assert ipaddress.ip_address(place.dns_address) in services
    six = ipaddress.ip_network(f"{place.network6}::/64")
    pods6, services6 = (ipaddress.ip_network(n) for n in (place.pod_cidr6, place.service_cidr6))
    assert not pods6.overlaps(services6)
    assert not pods6.overlaps(six)
    assert not services6.overlaps(six)
    for number in (1, 100):
        node = f"n{number}"
        assert ipaddress.ip_network(network.pod_cidr6(place, node)).subnet_of(pods6)
        assert ipaddress.ip_address(network.node_address6(place, node)) in six


@pytest.mark.parametrize("name", ["", "a/b", "..", "A", "a" * 30, "-a", "a b"])
def test_names_that_could_leave_their_place(name: str) -> None:
    with pytest.raises(TestbedError, match="lower-case"):
        Place(name, 0)
