"""Errors made for the user: their text, and their way from one rank to another."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bigtrain import errors
from bigtrain.errors import BigtrainError, ConfigError, Problem, Stopped
from bigtrain.lifetime import Interrupted, report_failure, report_success

PLAIN = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, BigtrainError)
    and kind not in (ConfigError, Stopped)
]


Report = Callable[[], dict]


def sent(error: BaseException) -> Any:
    """What another rank receives."""
    return pickle.loads(pickle.dumps(error))


def test_text() -> None:
    error = BigtrainError("it broke", where="a.yaml:3:1", why="too old\nby far", mend="renew it")
    assert str(error) == "a.yaml:3:1: it broke\n  why:  too old\nby far\n  mend: renew it"
    assert str(BigtrainError("it broke")) == "it broke"


def test_indent_reaches_every_line() -> None:
    problem = Problem("what", why="one\ntwo", where="here")
    assert problem.render("> ").splitlines() == ["> here: what", ">   why:  one", "> two"]


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_errors_survive_the_way(kind: type[BigtrainError]) -> None:
    """all_gather_object pickles them; the receiver must raise the same."""
    error = kind("what", where="where", why="why", mend="mend")
    got = sent(error)
    assert type(got) is kind
    assert str(got) == str(error)
    assert got.problem == error.problem
    assert got.exit_code == error.exit_code


def test_config_error_survives_the_way() -> None:
    error = ConfigError("a.yaml", [Problem("x", where="a.yaml:1:1"), Problem("y", mend="z")])
    got = sent(error)
    assert isinstance(got, ConfigError)
    assert str(got) == str(error)
    assert got.problems == error.problems
    assert (got.source, got.exit_code) == ("a.yaml", 2)


def test_config_error_counts_its_problems() -> None:
    assert str(ConfigError("a.yaml", [Problem("x")])).startswith("a.yaml: 1 problem\n")
    assert str(ConfigError("a.yaml", [Problem("x")] * 3)).startswith("a.yaml: 3 problems\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_survives_the_way(number: int) -> None:
    error = Stopped(number, "stopped after step 3", mend="go on")
    got = sent(error)
    assert isinstance(got, Stopped)
    assert str(got) == str(error)
    assert (got.signal_number, got.exit_code) == (number, 128 + number)


def test_subclasses_are_found() -> None:
    assert len(PLAIN) >= 7


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict]]:
    """What the launcher reads at the other end of its pipe."""
    read, write = os.pipe()
    os.set_blocking(write, False)  # a report that does not fit is cut instead of waiting for ever
    monkeypatch.setenv("BIGTRAIN_REPORT_FD", str(write))
    yield lambda: json.loads(os.read(read, 1_000_000))
    os.close(read)
    os.close(write)


@pytest.fixture(autouse=True)
def _signals_are_heard_again() -> Iterator[None]:
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, heard)


@pytest.mark.parametrize(
    ("error", "code", "consequence", "orderly"),
    [
        (errors.DataError("no file"), 1, False, False),
        (errors.CommError("a peer died"), 1, True, False),
        (ConfigError("a.yaml", [Problem("x")]), 2, False, False),
        (Stopped(15, "stopped"), 143, False, True),
        (KeyboardInterrupt(), 130, False, True),
        (Interrupted(15), 143, False, True),
    ],
)
def test_report_to_the_launcher(
    error: BaseException, code: int, consequence: bool, orderly: bool, report: Report
) -> None:
    """Everything that it needs to find the culprit; no traceback in errors for users."""
    assert report_failure(error) == code
    record = report()
    assert record["exit_code"] == code
    assert (record["consequence"], record["orderly"]) == (consequence, orderly)
    assert "Traceback" not in record["text"]


def test_other_errors_keep_their_traceback(report: Report) -> None:
    with pytest.raises(ValueError, match="a bug") as caught:
        raise ValueError("a bug")
    assert report_failure(caught.value) == 1
    text = report()["text"]
    assert text.startswith("Traceback")
    assert text.endswith("ValueError: a bug")


def test_without_a_launcher_it_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("BIGTRAIN_REPORT_FD", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert report_failure(errors.DataError("no file", mend="get one")) == 1
    assert capsys.readouterr().err == "error on rank 3: no file\n  mend: get one\n"


def test_long_errors_fit_into_the_pipe(report: Report) -> None:
    """Nobody may be reading yet; the end of the text is what tells."""
    assert report_failure(errors.DataError("é" * 200_000 + " the end")) == 1
    assert report()["text"].endswith(" the end")


def test_success_is_told_too(report: Report) -> None:
    report_success()
    assert report() == {"done": True}


@pytest.mark.parametrize("descriptor", ["9999", "none"])
def test_launcher_that_is_gone(
    descriptor: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Then the error is printed."""
    monkeypatch.setenv("BIGTRAIN_REPORT_FD", descriptor)
    assert report_failure(errors.DataError("no file")) == 1
    assert "no file" in capsys.readouterr().err


REPEATED = """
import os, signal, sys
from bigtrain.lifetime import Interrupted, StopRequest, report_failure
StopRequest()
try:
    os.kill(os.getpid(), signal.SIGINT)
except Interrupted as error:
    os.kill(os.getpid(), signal.SIGTERM)  # by another way, before it is told
    code = report_failure(error)
    os.kill(os.getpid(), signal.SIGINT)
    sys.exit(code)
"""


def test_a_request_that_comes_again_while_it_is_told() -> None:
    """A terminal sends it to all processes, the launcher passes it on."""
    env = {name: value for name, value in os.environ.items() if name != "BIGTRAIN_REPORT_FD"}
    done = subprocess.run(
        [sys.executable, "-c", REPEATED], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "error on rank 0: stopped by SIGINT; nothing was left to save\n"
