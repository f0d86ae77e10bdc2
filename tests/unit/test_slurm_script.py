"""Scripts of Slurm jobs, as text: golden files, and what stands in slurm/."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner
from unit_helpers import ROOT, assert_explained, load_text

from bigtrain.cli import app
from bigtrain.config.schema import Config
from bigtrain.errors import ConfigError, LaunchError, RunFolderError
from bigtrain.launch.jobs import cancel, follow
from bigtrain.launch.outcome import Ended
from bigtrain.launch.requeue import UNFINISHED, queue_again
from bigtrain.launch.slurm import (
    Script,
    allocation_of,
    combinations,
    make_submission,
    measured_lead,
    render,
    seconds_of,
)
from bigtrain.launch.slurm_commands import job_facts, queued_jobs
from bigtrain.launch.submit import Submitted, submit
from bigtrain.launch.time_limit import Saving, TimeLimit
from bigtrain.run_folder import RunFolder

GOLDEN = ROOT / "tests" / "golden" / "slurm"
RENDERED = sorted((ROOT / "slurm").glob("*.sh"))
BASE = "run: {dir: runs/try}\nparallel: {dp: 4}\n"

CASES = {
    "plain": BASE,
    "everything": """
run: {dir: 'runs/my 50% "try"'}
parallel: {dp: 16}
launch:
  nodes: 4
  slurm:
    account: proj#1
    partition: gpu,big
    qos: high
    time: "1-12:00:00"
    gpus_per_node: 4
    cpus_per_node: 32
    mem: 200G
    exclusive: true
    constraint: a100|h100
    exclude: n[3-4]
    reservation: course
    job_name: the big one
    signal_seconds: 600
    requeue: false
    after: afterok:12
    setup: [module load cuda/12, source ~/venv/bin/activate]
    options: [--mail-type=END, --nice=5]
""",
    "sweep": BASE
    + """
launch:
  slurm:
    sweep: {optimizer.lr: [0.001, 3.0e-4], run.seed: [0, 1], data.cache_dir: ["it's", null]}
    sweep_at_once: 2
""",
    "servers": """
run: {dir: runs/try}
parallel: {tp: 4, dp: 2}
launch: {nodes: 4, slurm: {gpus_per_node: 4, time: 60, partition: gpu}}
server:
  servers: 3
  workers: 2
  slurm: {nodes: 2, partition: cpu, mem: 100G, constraint: fast, options: [--exclusive]}
""",
    "servers_among_workers": """
run: {dir: runs/try}
parallel: {dp: 1}
launch: {nodes: 2, slurm: {}}
server: {servers: 2, workers: 4}
""",
    "elastic": """
run: {dir: runs/try}
launch: {nodes: "2:4", processes: 8, slurm: {cpus_per_node: 16}}
""",
}


@pytest.mark.parametrize("name", CASES)
def test_script_is_the_golden_one(name: str, tmp_path: Path) -> None:
    config = load_text(tmp_path, CASES[name])
    script = Script("config.yaml", "runs/try/slurm/config.yaml", "/home/me", ("bigtrain 1",), 75)
    text = render(config, script)
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("BIGTRAIN_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.name)
def test_slurm_folder_holds_what_is_rendered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change: bigtrain launch configs/NAME.yaml --slurm --dry-run > slurm/NAME.sh."""
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(
        app, ["launch", f"configs/{path.stem}.yaml", "--slurm", "--dry-run"], catch_exceptions=False
    )
    assert done.stdout == path.read_text()


def test_every_config_with_a_slurm_section_is_rendered() -> None:
    wanted = {
        path.stem for path in (ROOT / "configs").glob("*.yaml") if "\n  slurm:" in path.read_text()
    }
    assert wanted
    assert {path.stem for path in RENDERED} == wanted


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("2-0", 172800),
        ("1-2:03", 93780),
        ("1-2:03:04", 93784),
    ],
)
def test_times_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_no_time_is_left_for_the_run(tmp_path: Path) -> None:
    config = load_text(tmp_path, BASE + "launch: {slurm: {time: 1}}")
    with pytest.raises(LaunchError) as caught:
        render(config, Script("c", "c"))
    assert_explained(caught.value, "60 s", "120 s", "signal_seconds")


def test_lead_goes_by_what_was_measured() -> None:
    assert measured_lead(save_seconds=100, step_seconds=7) == 237


def test_ranks_that_nothing_tells_of(tmp_path: Path) -> None:
    config = load_text(tmp_path, "run: {dir: here}\n")
    with pytest.raises(LaunchError) as caught:
        allocation_of(config)
    assert_explained(caught.value, "gpus_per_node", "launch.processes")


@pytest.mark.parametrize(
    ("launch", "ranks"),
    [
        ("{slurm: {gpus_per_node: 8}, nodes: 2}", 16),
        ("{slurm: {cpus_per_node: 6}}", 6),
        ("{processes: 3, nodes: 2}", 6),
        ('{processes: 4, nodes: "1:2"}', 8),
    ],
)
def test_ranks_of_a_job(launch: str, ranks: int, tmp_path: Path) -> None:
    config = load_text(tmp_path, f"train: {{global_batch: 48}}\nlaunch: {launch}\n")
    assert make_submission(config).num_ranks == ranks


@pytest.mark.parametrize(
    ("slurm", "word"),
    [
        ("{time: tomorrow}", "a time as Slurm writes it"),
        ("{time: -1}", "a time as Slurm writes it"),
        ('{account: "a\\nb"}', "in one line"),
        ('{partition: ""}', "not empty"),
        ("{options: [hold]}", "an option of sbatch"),
        ('{setup: ["a\\nb"]}', "in one line"),
        ("{sweep: {train.steps: []}}", "at least 1 item"),
        ("{partitoin: gpu}", "did you mean launch.slurm.partition?"),
        ("{gpus_per_node: 0}", "at least 1"),
        ("7", "not a mapping"),
    ],
)
def test_bad_values_are_told(slurm: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, f"launch: {{slurm: {slurm}}}\n")
    assert word in str(caught.value)
    assert "config.yaml:1:" in str(caught.value)


@pytest.mark.parametrize("nodes", ["4:2", "0:2", "'2:'", "two", "-1", "2.0", "1:2:3"])
def test_bad_numbers_of_nodes(nodes: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="like 2:4"):
        load_text(tmp_path, f"launch: {{nodes: {nodes}}}\n")


def test_sweep_is_every_combination(tmp_path: Path) -> None:
    rows = combinations(load_text(tmp_path, CASES["sweep"]))
    assert len(rows) == 8
    assert rows[0] == [
        "optimizer.lr=0.001",
        "run.seed=0",
        "data.cache_dir=it's",
        "run.dir=runs/try/0",
    ]
    config = load_text(tmp_path, CASES["sweep"], *rows[0])
    assert config.data.cache_dir == "it's"


# -- Slurm, played by a function ---------------------------------------------------------------


class FakeSlurm:
    """Answers commands, and remembers them."""

    def __init__(self, **answers: str | LaunchError) -> None:
        self.answers = {"squeue": "", "sbatch": "17\n", "scancel": "", **answers}
        self.asked: list[list[str]] = []

    def __call__(self, command: object) -> str:
        words = list(command)  # type: ignore[call-overload]
        self.asked.append(words)
        answer = self.answers[words[0]]
        if isinstance(answer, LaunchError):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """What answers signals is as it was before."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def pause(seconds: float) -> None:
    """Do not wait."""


def hand_in(config: Config, *, resume: bool, ask: FakeSlurm) -> Submitted:
    plan = make_submission(config)
    return submit(config, plan, "config.yaml", resume=resume, restart=False, ask=ask)


def test_submission_freezes_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_text(tmp_path, BASE)
    slurm = FakeSlurm(sbatch="17;cluster\n")
    done = submit(
        config, make_submission(config), "config.yaml", resume=False, restart=False, ask=slurm
    )
    assert done.numbers == ("17",)
    assert slurm.asked[-1] == ["sbatch", "--parsable", "runs/try/slurm/job.sh"]
    text = (tmp_path / "runs/try/slurm/job.sh").read_text()
    assert f"#SBATCH --chdir={tmp_path}\n" in text
    assert f"#SBATCH --comment=bigtrain:{tmp_path}/runs/try\n" in text
    assert not (tmp_path / "runs/try/config.next.yaml").exists()
    frozen = (tmp_path / "runs/try/slurm/config.yaml").read_text()
    read = load_text(tmp_path, frozen)
    assert read.launch.processes == 4, "as many on a node as were counted"
    launch = read.launch.model_copy(update={"processes": "auto"})
    assert read.model_copy(update={"launch": launch}) == config


def test_lead_of_the_next_job_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/try").mkdir(parents=True)
    (tmp_path / "runs/try/metrics.jsonl").write_text(
        '{"step": 1, "items": 100, "items_per_second": 10.0}\n'
        '{"step": 1, "save_seconds": 60.5}\n{"st'
    )
    config = load_text(tmp_path, BASE)
    submit(
        config, make_submission(config), "config.yaml", resume=True, restart=False, ask=FakeSlurm()
    )
    assert "--signal=B:USR1@161\n" in (tmp_path / "runs/try/slurm/job.sh").read_text()


def test_a_run_that_is_queued_is_not_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"17|17|PENDING|0:00|1:00|2|Priority|bigtrain:{tmp_path}/runs/try\n"
    config = load_text(tmp_path, BASE)
    with pytest.raises(LaunchError) as caught:
        hand_in(config, resume=False, ask=FakeSlurm(squeue=line))
    assert_explained(caught.value, "job 17", "pending", "bigtrain jobs cancel 17")


def test_a_chain_that_breaks_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Full(FakeSlurm):
        def __call__(self, command: object) -> str:
            if sum(words[0] == "sbatch" for words in self.asked) == 2:
                self.answers["sbatch"] = LaunchError("the queue is full")
            return super().__call__(command)

    slurm = Full()
    config = load_text(tmp_path, BASE + "launch: {slurm: {chain: 3}}")
    with pytest.raises(LaunchError, match="the queue is full"):
        submit(
            config, make_submission(config), "config.yaml", resume=False, restart=False, ask=slurm
        )
    assert slurm.asked[2][2:4] == ["--dependency=afternotok:17", "--kill-on-invalid-dep=yes"]
    assert slurm.asked[-2:] == [["scancel", "17"], ["scancel", "17"]]


def test_other_jobs_are_not_ours() -> None:
    lines = (
        "9|9|RUNNING|1:00|2:00|1|None|(null)\n"
        "nonsense\n"
        "17_[2-3%2]|17|PENDING|0:00|1:00|2|Priority|bigtrain:/home/me/a|b\n"
        "8|8|RUNNING|0:01|1:00|2|None|bigtrain:/x\n"
    )
    found = queued_jobs(FakeSlurm(squeue=lines))
    assert [(job.number, job.array, job.folder) for job in found] == [
        ("8", "8", "/x"),
        ("17_[2-3%2]", "17", "/home/me/a|b"),
    ]


def test_facts_of_a_job() -> None:
    line = (
        "JobId=17 JobName=a b Requeue=1 Restarts=0 JobState=RUNNING Reason=None "
        "StdOut=/tmp/a b/17.out Power=\n"
    )
    facts = job_facts("17", FakeSlurm(scontrol=line))
    assert (facts["JobName"], facts["StdOut"], facts["Power"]) == ("a b", "/tmp/a b/17.out", "")


IN_TIME = "JobState=RUNNING Requeue=1 RunTime=00:01:00 TimeLimit=1-00:00:00 EndTime=Unknown"
OVER_TIME = "JobState=COMPLETING Requeue=1 RunTime=1-00:00:02 TimeLimit=1-00:00:00 EndTime=x"


@pytest.mark.parametrize(
    ("ended", "facts", "stepped", "code", "requeued"),
    [
        (Ended(143, "stopped", 10), "Requeue=1 JobId=17", True, UNFINISHED, True),
        (Ended(143, "stopped", 10), "Requeue=0 JobId=17", True, UNFINISHED, False),
        (Ended(143, "stopped", 10), "Requeue=1 JobId=17", False, 143, False),
        (Ended(143, "stopped", 15), "Requeue=1 PreemptTime=None", True, 143, False),
        (Ended(143, "stopped", 15), "Requeue=1 PreemptTime=2026-11-24", True, UNFINISHED, True),
        (Ended(143, "stopped", 15), "Requeue=1 PreemptTime=2026-11-24", False, UNFINISHED, True),
        (Ended(1, "gone", None, ["n2"]), "Requeue=1 JobId=17", True, UNFINISHED, True),
        (Ended(1, "gone", None, ["n2"]), "Requeue=1 JobId=17", False, UNFINISHED, True),
        (Ended(1, "gone", None, ["n2"]), "Requeue=1 BatchFlag=0", True, 1, False),
        (Ended(1, "?", None, ["n2"], how_lost="absent"), "Requeue=1 JobId=17", True, 1, False),
        (Ended(1, "?", None, ["n2"], how_lost="unfit"), "Requeue=1 JobId=17", True, 1, False),
        (Ended(143, "stopped", 10), "JobState=CANCELLED Requeue=1", True, 143, False),
        # What Slurm says as long as there are processes of a job that was cancelled.
        (Ended(143, "stopped", 10), "JobState=COMPLETING Requeue=1", True, 143, False),
        (Ended(143, "stopped", 10), IN_TIME.replace("RUNNING", "COMPLETING"), True, 143, False),
        (Ended(143, "stopped", 10), IN_TIME, True, UNFINISHED, True),
        (Ended(143, "stopped", 10), OVER_TIME, True, UNFINISHED, True),
        (Ended(1, "a bug", None), "Requeue=1 JobId=17", True, 1, False),
    ],
)
def test_which_ends_queue_up_again(
    ended: Ended, facts: str, stepped: bool, code: int, requeued: bool
) -> None:
    slurm = FakeSlurm(scontrol=facts)
    told: list[str] = []
    error = queue_again(ended, {"SLURM_JOB_ID": "17"}, stepped, told.append, slurm, pause)
    assert error.exit_code == code
    assert (["scontrol", "requeue", "17"] in slurm.asked) == requeued
    assert len(told) == int(code == UNFINISHED or not stepped)


def test_a_node_that_is_away_at_a_restart_may_have_died() -> None:
    """Slurm may not have noticed yet, and given it to the job again."""
    env = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}
    ended = Ended(1, "?", None, ["n2"], how_lost="absent")
    slurm = FakeSlurm(scontrol="Requeue=1 JobId=17")
    assert queue_again(ended, env, False, lambda _: None, slurm, pause).exit_code == UNFINISHED


def test_nodes_that_are_lost_again_and_again() -> None:
    env = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "3"}
    slurm, told = FakeSlurm(scontrol="Requeue=1 JobId=17"), []
    error = queue_again(Ended(1, "gone", None, ["n2"]), env, False, told.append, slurm, pause)
    assert error.exit_code == 1
    assert told == ["lost n2, but nothing new was saved: it is not queued again"]


def test_a_job_of_an_array_is_requeued_alone() -> None:
    """The number of one of them is that of all: Slurm would run them all again."""
    env = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    slurm = FakeSlurm(scontrol="Requeue=1 JobId=17")
    queue_again(Ended(143, "stopped", 10), env, True, lambda _: None, slurm, pause)
    assert slurm.asked == [
        ["scontrol", "show", "job", "-o", "17_3"],
        ["scontrol", "requeue", "17_3"],
    ]


def test_slurm_that_does_not_answer_at_the_end() -> None:
    told: list[str] = []
    slurm = FakeSlurm(scontrol=LaunchError("no answer"))
    ended = Ended(143, "stopped", 10)
    waited: list[float] = []
    assert (
        queue_again(ended, {"SLURM_JOB_ID": "17"}, True, told.append, slurm, waited.append) is ended
    )
    assert len(waited) == 3, "a busy Slurm is asked again"
    assert "could not be requeued: no answer" in told[0]


# -- a sweep, again ----------------------------------------------------------------------------


def test_another_sweep_does_not_go_on_where_the_one_before_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = BASE + "launch: {slurm: {sweep: {optimizer.lr: VALUES}}}\n"
    first = load_text(tmp_path, sweep.replace("VALUES", "[0.001, 0.0003]"))
    hand_in(first, resume=False, ask=FakeSlurm())
    (tmp_path / "runs/try/0/checkpoints/step-00000004").mkdir(parents=True)  # one has begun
    other = load_text(tmp_path, sweep.replace("VALUES", "[0.01, 0.0001]"))
    with pytest.raises(RunFolderError, match="holds a run already"):
        hand_in(other, resume=False, ask=FakeSlurm())
    with pytest.raises(LaunchError) as caught:
        hand_in(other, resume=True, ask=FakeSlurm())
    assert_explained(caught.value, "another sweep", "0.0003", "--restart")
    hand_in(first, resume=True, ask=FakeSlurm())
    plan = make_submission(other)
    submit(other, plan, "config.yaml", resume=False, restart=True, ask=FakeSlurm())
    assert (tmp_path / "runs/try.old-1/0/checkpoints/step-00000004").is_dir()
    assert not (tmp_path / "runs/try/0").exists()


# -- time --------------------------------------------------------------------------------------


class Clock:
    """A job that Slurm ends at noon, and a clock to turn."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.now = RunFolder(folder), self.time("11:00:00")
        self.slurm = FakeSlurm(scontrol="EndTime=2026-11-24T12:00:00 JobState=RUNNING")

    @staticmethod
    def time(text: str) -> float:
        return time.mktime(time.strptime(f"2026-11-24T{text}", "%Y-%m-%dT%H:%M:%S"))

    def limit(self) -> TimeLimit:
        return TimeLimit(self.folder, {"SLURM_JOB_ID": "17"}, self.slurm, lambda: self.now)


def test_a_job_saves_as_early_as_saving_takes(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "run")
    limit, other = clock.limit(), clock.limit()
    clock.now = clock.time("11:59:30")
    assert not limit.is_near(), "nothing was measured: Slurm's own signal will come"
    clock.folder.metrics.write_text('{"step": 4, "save_seconds": 300.0}\n')
    clock.now = clock.time("11:49:00")  # 2 x 300 s + 30 s are needed, and the time between looks
    assert not other.is_near()
    clock.now = clock.time("11:49:16")
    assert other.is_near()


def test_saving_that_takes_longer_than_the_job(tmp_path: Path) -> None:
    """It trains for half of its time: that is as good as can be, and better than not at all."""
    clock = Clock(tmp_path / "run")
    clock.folder.metrics.write_text('{"step": 4, "save_seconds": 3000.0}\n')
    limit = clock.limit()
    clock.now = clock.time("11:29:00")
    assert not limit.is_near()
    clock.now = clock.time("11:30:00")
    assert limit.is_near()


def test_slurm_that_does_not_tell_the_end_at_once(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "run")
    clock.folder.metrics.write_text('{"step": 4, "save_seconds": 300.0}\n')
    limit, good = clock.limit(), clock.slurm.answers["scontrol"]
    clock.slurm.answers["scontrol"] = LaunchError("busy")
    clock.now = clock.time("11:49:16")
    assert not limit.is_near()
    clock.slurm.answers["scontrol"] = good
    clock.now = clock.time("11:49:32")
    assert limit.is_near()


def test_a_time_limit_that_was_moved(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "run")
    limit = clock.limit()
    clock.folder.metrics.write_text('{"step": 4, "save_seconds": 300.0}\n')
    clock.slurm.answers["scontrol"] = "EndTime=2026-11-24T13:00:00 JobState=RUNNING"
    clock.now = clock.time("11:49:16")
    assert not limit.is_near()
    clock.now = clock.time("12:49:16")
    assert limit.is_near()


def test_what_is_measured_is_read_as_it_grows(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "run")
    saving = Saving(clock.folder)
    assert saving.lead() is None
    with open(clock.folder.metrics, "a") as metrics:
        metrics.write('{"step": 1, "items": 100, "items_per_second": 10.0}\n')
        metrics.write('{"step": 1, "save_seconds": 60.5}\n')
        metrics.flush()
        assert saving.lead() == 161
        metrics.write('{"step": 2, "save_seconds": 100}\n')
    assert saving.lead() == 240
    clock.folder.metrics.write_text('{"step": 1, "save_seconds": 200}\n')  # cut by a resumed run
    assert saving.lead() == 440


@pytest.mark.parametrize("end", ["Unknown", "", "NONE"])
def test_no_time_limit(end: str, tmp_path: Path) -> None:
    clock = Clock(tmp_path / "run")
    clock.slurm.answers["scontrol"] = f"EndTime={end} JobState=RUNNING"
    clock.folder.metrics.write_text('{"step": 4, "save_seconds": 1e9}\n')
    assert not clock.limit().is_near()
    limit = clock.limit()
    asked = len(clock.slurm.asked)
    for _ in range(4):
        clock.now += 60
        assert not limit.is_near()
    assert len(clock.slurm.asked) == asked + 1, "Slurm has answered, and is left in peace"


# -- the queue ---------------------------------------------------------------------------------


QUEUE = (
    "17|17|RUNNING|1:00|2:00|1|None|bigtrain:/runs/chain\n"
    "18|18|PENDING|0:00|2:00|1|Dependency|bigtrain:/runs/chain\n"
    "20_1|20|RUNNING|0:00|2:00|1|None|bigtrain:/runs/sweep\n"
    "20_2|20|PENDING|0:00|2:00|1|Resources|bigtrain:/runs/sweep\n"
)


def cancelled(*wishes: str) -> tuple[FakeSlurm, list[str], str]:
    slurm, lines, error = FakeSlurm(squeue=QUEUE), [], ""
    try:
        for line in cancel(wishes, slurm):
            lines.append(line)
    except LaunchError as failure:
        error = str(failure)
    return slurm, lines, error


def test_all_jobs_that_are_there_are_cancelled() -> None:
    """The first of a chain has ended: those after it are the ones that matter."""
    slurm, lines, error = cancelled("16", "17", "18")
    assert slurm.asked[-1] == ["scancel", "17", "18"]
    assert lines == ["cancelled 17", "cancelled 18"]
    assert "no job of bigtrain that waits or runs is 16" in error


def test_the_next_of_a_chain_is_told_of() -> None:
    slurm, lines, error = cancelled("17")
    assert slurm.asked[-1] == ["scancel", "17"]
    assert lines[1] == "job 18 of the same run waits for its turn, and is not cancelled"
    assert not error


def test_a_sweep_is_cancelled_whole_or_by_the_job() -> None:
    assert cancelled("20")[0].asked[-1] == ["scancel", "20"]
    assert cancelled("20_2")[0].asked[-1] == ["scancel", "20_2"]
    assert cancelled("/runs/sweep")[0].asked[-1] == ["scancel", "20"]


def test_following_goes_on_when_slurm_does_not_answer_for_a_while() -> None:
    answers = iter(
        [LaunchError("busy"), "JobState=RUNNING", LaunchError("busy"), "JobState=COMPLETED"]
    )

    def ask(command: object) -> str:
        answer = next(answers)
        if isinstance(answer, LaunchError):
            raise answer
        return answer

    told: list[str] = []
    assert follow("17", lambda _: None, told.append, ask, pause) == 0
    assert told == ["job 17: running", "job 17: completed"]
