"""What `lfm serve` refuses before it loads anything, and addresses."""

import socket

import pytest

from lfm_jax.serve import launch


@pytest.fixture
def without_key(monkeypatch):
    monkeypatch.delenv(launch.KEY_VARIABLE, raising=False)


def test_a_port_that_is_taken(without_key):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on port {port} of 127.0.0.1: another program has it"):
            launch.listen("127.0.0.1", port)


def test_a_port_that_another_server_has_taken_and_does_not_serve_yet(without_key):
    with launch.listen("127.0.0.1", 0) as first, pytest.raises(ValueError, match="another program has it"):
        launch.listen("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none(without_key, port):
    with pytest.raises(ValueError, match=f"port is {port}; it must be from 0 to 65535"):
        launch.listen("127.0.0.1", port)


def test_an_address_that_others_reach_needs_a_key(without_key, monkeypatch):
    with pytest.raises(ValueError, match="can be reached from elsewhere"):
        launch.listen("0.0.0.0", 0)
    monkeypatch.setenv(launch.KEY_VARIABLE, "k")
    with launch.listen("0.0.0.0", 0) as address:
        assert address.getsockname()[1] > 0


@pytest.mark.parametrize("key", ["kéy", "a\nb", " a"])
def test_a_key_that_no_header_can_carry(monkeypatch, key):
    monkeypatch.setenv(launch.KEY_VARIABLE, key)
    with pytest.raises(ValueError, match="cannot be sent in a header"):
        launch.listen("127.0.0.1", 0)


def test_a_host_that_is_none(without_key, monkeypatch):
    monkeypatch.setenv(launch.KEY_VARIABLE, "k")
    with pytest.raises(ValueError, match="cannot listen on port 0 of no-such-host: "):
        launch.listen("no-such-host", 0)
