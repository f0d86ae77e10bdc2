"""What a launcher tells servers and workers goes through environment variables."""

from __future__ import annotations

import pytest
from unit_helpers import assert_explained

from bigtrain.errors import PlanError
from bigtrain.server.chaos import parse
from bigtrain.server.environment import Environment, is_server

ADDRESSES = (("127.0.0.1", 4000), ("node-7.cluster", 65535), ("fe80::1", 4002))
GOOD = {"BIGTRAIN_SERVERS": "a:1,b:2", "BIGTRAIN_TOKEN": "secret"}


@pytest.mark.parametrize(
    "environment",
    [
        Environment(ADDRESSES, "secret"),
        Environment(ADDRESSES, "secret", server=0, listen_fd=3),
        Environment(ADDRESSES[:1], "secret", worker=12, incarnation=4, sharers=5, ranks=4),
        Environment(
            ADDRESSES[1:],
            "secret",
            server=0,
            worker=0,
            chaos=(
                parse("kill:worker=1,step=20"),
                parse("delay:server=0,step=3,seconds=0.5,ms=20"),
            ),
        ),
    ],
)
def test_it_comes_through(environment: Environment) -> None:
    env = environment.to_env()
    assert all(isinstance(value, str) for value in env.values())
    assert Environment.read({"PATH": "/bin", **env}) == environment
    assert is_server(env) == (environment.server is not None)


def test_the_least() -> None:
    assert Environment.read(GOOD) == Environment((("a", 1), ("b", 2)), "secret")
    assert not is_server(GOOD)


def test_brackets_around_a_host() -> None:
    read = Environment.read({**GOOD, "BIGTRAIN_SERVERS": "[::1]:80, b:2"})
    assert read.addresses == (("::1", 80), ("b", 2))


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("name", GOOD)
def test_something_is_missing(name: str, value: str | None) -> None:
    env = {key: text for key, text in {**GOOD, name: value}.items() if text is not None}
    with pytest.raises(PlanError) as caught:
        Environment.read(env)
    assert_explained(caught.value, f"environment: {name} is not set", "bigtrain launch")


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a:",
        ":1",
        "a:1,",
        ",",
        "a:b",
        "a:-1",
        "a:65536",
        "a:1.5",
        "a:\u00b2",
        "a:" + "9" * 5000,
    ],
    ids=lambda text: ascii(text)[:12],
)
def test_servers_make_no_sense(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Environment.read({**GOOD, "BIGTRAIN_SERVERS": text})
    assert_explained(caught.value, "environment: BIGTRAIN_SERVERS has", "host:port")


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1.0", " 1", "\u00b2", "9" * 5000], ids=lambda text: ascii(text)[:12]
)
@pytest.mark.parametrize("name", ["SERVER", "WORKER", "INCARNATION", "LISTEN_FD"])
def test_numbers_make_no_sense(name: str, text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Environment.read({**GOOD, f"BIGTRAIN_{name}": text})
    assert_explained(caught.value, f"environment: BIGTRAIN_{name} is", "it is a number")


@pytest.mark.parametrize(
    "text", ["x", "kill:worker=1", "kill:worker=1,step=2 burn:server=0,step=1"]
)
def test_drills_make_no_sense(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Environment.read({**GOOD, "BIGTRAIN_CHAOS": text})
    assert_explained(caught.value, f"BIGTRAIN_CHAOS is '{text}'", "is no event")
