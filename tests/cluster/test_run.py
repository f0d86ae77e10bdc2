"""A run from the command line to the loss curve, as a user sees it."""

import fcntl
import os
import pty
import termios
import threading

import pytest
import yaml
from runs import Bench, Run

pytestmark = pytest.mark.cluster

WITH_ALL = ("eval.every=4", "eval.generate=8", "checkpoint.every=4", "log.sample_ids=true")


class Terminal:
    """A pseudo-terminal for a launcher, and all that was drawn on it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (40, 100))
        self.drawn = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def streams(self) -> dict:
        """Return Popen arguments that make this the controlling terminal of a process."""
        slave = self.slave

        def control() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        return {"stdin": slave, "stdout": slave, "stderr": slave, "preexec_fn": control}

    def started(self) -> None:
        """Leave the terminal to the process."""
        os.close(self.slave)

    def finish(self) -> str:
        """Return all that was drawn, once the process is gone."""
        self._reader.join(10)
        os.close(self.master)
        return self.drawn.decode(errors="replace")

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self.master, 65536)
            except OSError:
                return
            if not chunk:
                return
            self.drawn += chunk


@pytest.fixture(scope="module")
def finished(shared_bench: Bench) -> Run:
    """A run of 8 steps on 2 ranks that nobody disturbed."""
    return shared_bench.launch(*WITH_ALL, "run.dir=first")


def test_everything_promised_is_in_the_run_folder(finished: Run) -> None:
    folder = finished.folder
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 8
    assert {p.name for p in (folder / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert len(finished.losses()) == 8
    assert list(finished.validation_losses()) == [4, 8]
    assert list(finished.sample_ids()) == list(range(1, 9))
    assert any((folder / "tensorboard").glob("events.out.tfevents.*"))
    picture = (folder / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.rstrip().endswith(b"IEND\xaeB`\x82")
    assert finished.checkpoints() == ["step-00000004", "step-00000008"]
    finished.assert_clean()
    assert not list(folder.rglob("*.tmp")) + list(folder.rglob(".writing-*"))


def test_tensorboard_has_the_curve(finished: Run) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(finished.folder / "tensorboard"))
    events.Reload()
    points = {e.step: e.value for e in events.Scalars("loss")}
    assert points == pytest.approx(dict(enumerate(finished.losses(), 1)))


def test_screen_without_a_terminal_is_plain_lines(finished: Run) -> None:
    out = finished.out
    assert "\x1b[" not in out
    assert sum(line.startswith("step ") and "tokens/s" in line for line in out.splitlines()) == 8
    for word in ("validation loss", "unigram entropy", "bigram entropy", "a sample of the model"):
        assert word in out
    assert "checkpoint   first/checkpoints/step-00000008" in out
    assert finished.err == "this machine: 2 ranks here\n"
    log = (finished.folder / "logs" / "rank-0.log").read_text(errors="replace")
    assert [x.rstrip() for x in log.split("\n")] == [x.rstrip() for x in out.split("\n")]


def test_sample_of_a_poor_model_does_no_harm_to_a_terminal(bench: Bench) -> None:
    """It makes any bytes, those that clear the screen or ring the bell among them."""
    run = bench.launch("parallel.dp=1", "train.steps=1", "eval.generate=300")
    sample = run.out[run.out.index("a sample of the model:") : run.out.index("\ncheckpoint ")]
    assert {c for c in sample if not c.isprintable()} <= {"\n", "\t"}


def test_screen_shows_rank_0_alone(finished: Run) -> None:
    assert "step 8/8" in (finished.folder / "logs" / "rank-1.log").read_text()
    assert finished.out.count("step 8/8") == 1


def test_terminal_has_a_live_bar_and_the_log_has_none(bench: Bench) -> None:
    terminal = Terminal()
    run = bench.start(*WITH_ALL, "train.steps=20", **terminal.streams())
    terminal.started()
    assert run.wait() == 0
    drawn = terminal.finish()
    assert drawn.count("\x1b[") > 20  # it was redrawn
    for word in ("training", "━", "20/20", "tokens/s", "ETA", "to continue"):
        assert word in drawn
    log = (run.folder / "logs" / "rank-0.log").read_text()
    assert "\x1b" not in log
    assert "\r" not in log
    assert "step 20/20" in log
    assert "to continue" in log
    assert sum("━━━" in line for line in log.splitlines()) <= 1  # only how the bar ended
    run.assert_clean()


def test_ctrl_c_on_a_terminal_saves_and_ends(bench: Bench) -> None:
    terminal = Terminal()
    run = bench.start("train.steps=5000", **terminal.streams())
    terminal.started()
    run.wait_step(3)
    os.write(terminal.master, b"\x03")
    code = run.wait()
    drawn = terminal.finish()
    assert code == 130, drawn
    assert "stopped after step" in drawn
    assert "Traceback" not in drawn
    assert "\x1b[?25h" in drawn[drawn.rindex("training") :]  # the cursor is back
    assert run.checkpoints()
    run.assert_clean()


def test_a_terminal_that_goes_away_ends_the_run_in_order(bench: Bench) -> None:
    """As when the ssh connection is cut: SIGHUP, and a screen that cannot be written to."""
    master, slave = pty.openpty()

    def control() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    streams = {"stdin": slave, "stdout": slave, "stderr": slave, "preexec_fn": control}
    run = bench.start("train.steps=5000", "log.every=5000", **streams)
    os.close(slave)
    run.wait_step(3)
    os.close(master)
    assert run.wait() in (129, 143)  # 128 + SIGHUP, or + what the ranks are sent for it
    assert run.checkpoints(), "the ranks were not allowed to save"
    run.assert_clean()


def test_a_reader_that_leaves_does_not_cost_the_log(bench: Bench) -> None:
    """`bigtrain launch config.yaml | head -1`: the run goes on, or ends; its log says how."""
    read_end, write_end = os.pipe()
    run = bench.start(stdout=write_end)
    os.close(write_end)
    os.read(read_end, 1)
    os.close(read_end)
    run.wait()
    log = (run.folder / "logs" / "rank-0.log").read_text()
    assert "step 8/8" in log
    assert "to continue" in log
    run.assert_clean()


def test_same_config_and_layout_give_the_same_bits(finished: Run, shared_bench: Bench) -> None:
    again = shared_bench.launch(*WITH_ALL, "run.dir=again")
    timeless = [
        [{k: v for k, v in record.items() if "second" not in k} for record in run.metrics()]
        for run in (finished, again)
    ]
    assert timeless[0] == timeless[1]
    assert finished.sample_ids() == again.sample_ids()
    files = [
        sorted((run.folder / "checkpoints" / "step-00000008").glob("*.safetensors"))
        for run in (finished, again)
    ]
    assert len(files[0]) == 2
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_resuming_a_complete_run_says_so(finished: Run, shared_bench: Bench) -> None:
    before = finished.metrics()
    done = shared_bench.launch(*WITH_ALL, "run.dir=first", resume=True)
    assert "step 8 of 8 is done already" in done.out
    assert "train.steps" in done.out
    assert done.metrics() == before
    assert done.checkpoints() == ["step-00000004", "step-00000008"]
    done.assert_clean()


def test_the_command_at_the_end_continues(finished: Run, shared_bench: Bench) -> None:
    (line,) = [x for x in finished.out.splitlines() if x.startswith("to continue")]
    program, verb, config, *rest = line.removeprefix("to continue").split()
    assert (program, verb) == ("bigtrain", "launch")
    overrides = [part for part in rest if part != "--resume"]
    run = shared_bench.launch(*overrides, config=config, resume="--resume" in rest)
    assert "resumed from" in run.out
    records = [r["step"] for r in finished.metrics() if "loss" in r]
    assert records == list(range(1, 17))
