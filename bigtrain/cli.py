"""The verbs of the command line. Starting must be fast, so each verb imports what it needs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from bigtrain.errors import BigtrainError, PlanError, Stopped

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bigtrain.config.schema import Config
    from bigtrain.launch.plan import Plan

app = typer.Typer(
    name="bigtrain",
    help="Train large models on many devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
ckpt = typer.Typer(no_args_is_help=True, help="List, inspect and verify checkpoints.")
app.add_typer(ckpt, name="ckpt")
jobs = typer.Typer(help="List, follow and cancel the jobs of bigtrain in Slurm's queue.")
app.add_typer(jobs, name="jobs")

ConfigPath = Annotated[str, typer.Argument(help="YAML file of the run", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="like train.steps=20", metavar="[SECTION.KEY=VALUE]...")
]
Folder = Annotated[str, typer.Argument(help="a run folder, or its checkpoints folder")]


@app.command()
def launch(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last good checkpoint.")] = False,
    restart: Annotated[
        bool, typer.Option(help="Move an old run in the same folder aside, and start over.")
    ] = False,
    hosts: Annotated[str, typer.Option(help="Machines to start ranks on by ssh, like a,b.")] = "",
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit it as a Slurm job, as launch.slurm says.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the log of the job until it ends.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be started where; start nothing.")
    ] = False,
    chaos: Annotated[
        list[str] | None,
        typer.Option(
            "--chaos",
            help="A drill for a run with servers: kill:worker=1,step=20; or stop, cut, delay.",
        ),
    ] = None,
) -> None:
    """Train: start the ranks, here or on several nodes, and watch over them.

    In a Slurm job on its nodes, else on --hosts, else on this machine. Started by srun, mpiexec or
    torchrun itself, it is a rank. With --slurm, or a section launch.slurm, it is submitted.
    """
    from bigtrain.comm.started import starter_of
    from bigtrain.launch.frozen import changed_since
    from bigtrain.launch.lead import dry_lines, dry_mpi_lines, lead, lead_mpi
    from bigtrain.run_folder import open_run
    from bigtrain.server.chaos import parse

    for pair, both in (
        ("--resume and --restart", resume and restart),
        ("--slurm and --hosts", slurm and hosts),
    ):
        if both:
            raise BigtrainError(f"{pair} exclude each other", mend="give one of them")
    if (starter := starter_of()) is not None:
        if hosts or slurm or follow or dry_run:
            raise BigtrainError(
                f"{starter} has started this as one of its ranks",
                why="--hosts, --slurm, --follow and --dry-run are for who starts ranks",
                mend=f"leave these out, or call it without {starter}",
            )
        _be_a_rank(config, overrides, resume, restart)
    _refuse_unknown_starter(os.environ)
    events = [parse(text) for text in chaos or ()]
    try:
        with _interrupts_count():
            read, plan = _read(config, overrides, hosts, slurm)
        if events and not plan.servers:
            raise BigtrainError(
                "--chaos is for runs with servers",
                why="without them, a rank that is gone ends the run",
                mend="set server.servers, or leave it out",
            )
        if plan.start == "sbatch":
            if events:
                raise BigtrainError(
                    "--chaos is for a run that is started now, not for a job",
                    why="a job that queues up again would go through the same drill again",
                    mend="give it to bigtrain launch in an allocation (salloc), or leave it out",
                )
            _check_sweep(read, config, overrides, plan.num_ranks)
            raise typer.Exit(_submit(read, plan, config, resume, restart, follow, dry_run))
        if not dry_run and (warning := changed_since(config)):
            _say(f"warning: {warning}")
        if plan.start == "mpiexec":
            options = ["--resume"] * resume + ["--restart"] * restart
            words = [config, *(overrides or []), *options]
            if dry_run:
                for line in dry_mpi_lines(read, plan, words):
                    typer.echo(line)
                return
            raise typer.Exit(lead_mpi(read, plan, words))
        if follow:
            raise BigtrainError("--follow is for Slurm jobs", mend="give --slurm as well")
        if dry_run:
            for line in dry_lines(read, plan, resume):
                typer.echo(line)
            return
        with _interrupts_count():
            folder, lock = open_run(read, resume=resume, restart=restart)
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, "stopped before any rank was started") from None
    try:
        with lock:
            raise typer.Exit(lead(read, plan, folder, resume, events))
    finally:
        folder.next_config.unlink(missing_ok=True)  # left only by a run that did not begin


@contextlib.contextmanager
def _interrupts_count() -> Iterator[None]:
    """See that a Ctrl-C ends this, if only at the end: a C extension may swallow the exception
    while it is imported."""
    heard: list[int] = []

    def note(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        if not heard:  # else it is the consequence
            raise
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


def _be_a_rank(config: str, overrides: list[str] | None, resume: bool, restart: bool) -> NoReturn:
    """Run the rank that srun, mpiexec or torchrun has started this process as."""
    from bigtrain.train import exit_now, main

    options = ["--resume"] * resume + ["--restart"] * restart
    exit_now(main([config, *(overrides or []), *options]))


def _refuse_unknown_starter(env: Mapping[str, str]) -> None:
    """See that this is not one rank of several: each would start a world of its own.

    Raises:
        PlanError: somebody has set RANK and WORLD_SIZE.
    """
    size = env.get("WORLD_SIZE", "1")
    if "RANK" in env and size != "1":
        raise PlanError(
            f"RANK={env['RANK']} and WORLD_SIZE={size} are set, so this is one of {size} ranks",
            where="environment",
            why=f"bigtrain launch would start all ranks here, and so {size} worlds of their own",
            mend="start python -m bigtrain.train CONFIG as each rank, with LOCAL_RANK and "
            "LOCAL_WORLD_SIZE set too, or unset RANK and WORLD_SIZE",
        )


def _submit(
    config: Config, plan: Plan, source: str, resume: bool, restart: bool, show: bool, dry_run: bool
) -> int:
    """Hand the run to Slurm, or print the script that would be; return the exit code."""
    from bigtrain.launch.submit import dry_script, submit

    if dry_run:
        _say(str(plan))
        typer.echo(dry_script(config, source), nl=False)
        return 0
    done = submit(config, plan, source, resume=resume, restart=restart)
    numbers = ", ".join(done.numbers)
    typer.echo(f"job {numbers}: {plan}")
    typer.echo(f"  script   {done.script}, also for sbatch by hand")
    typer.echo(f"  follow   bigtrain jobs follow {done.numbers[0]}")
    typer.echo(f"  cancel   bigtrain jobs cancel {' '.join(done.numbers)}")
    first = done.numbers[0] + ("_0" if config.launch.slurm and config.launch.slurm.sweep else "")
    return _follow(first) if show else 0


def _check_sweep(config: Config, path: str, overrides: list[str] | None, num_ranks: int) -> None:
    """Find out now what is wrong with a job of the sweep, and not when it is its turn."""
    from bigtrain.config.load import load_config
    from bigtrain.launch.slurm import combinations

    for row in combinations(config):
        load_config(path, [*(overrides or []), *row], num_ranks)


def _follow(number: str) -> int:
    from bigtrain.launch.jobs import follow

    try:
        return follow(number, lambda text: typer.echo(text, nl=False), _say)
    except KeyboardInterrupt:
        _say(f"job {number} goes on without you; bigtrain jobs cancel {number} ends it")
        return 128 + signal.SIGINT


def _read(
    path: str, overrides: list[str] | None, hosts: str = "", slurm: bool = False
) -> tuple[Config, Plan]:
    """Return the config, checked against the ranks that would be started, and which those are."""
    from bigtrain.config.load import load_config
    from bigtrain.launch.plan import find_allocation, find_hosts, make_plan
    from bigtrain.launch.slurm import make_submission

    allocation = find_allocation(os.environ)
    names = find_hosts(hosts)

    def plan(config: Config) -> Plan:
        if slurm or (config.launch.slurm is not None and allocation is None and not names):
            return make_submission(config)
        return make_plan(config, os.environ, allocation, names)

    read = load_config(path, overrides or [], lambda config: plan(config).num_ranks)
    return read, plan(read)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Tell everything that is wrong with a config, or what it amounts to. Needs no torch."""
    from bigtrain.config.check import describe_schedule, layout_of, microbatches_of, replicas_of

    read, plan = _read(config, overrides)
    layout = layout_of(read, plan.num_ranks)
    size, count = microbatches_of(read, layout)
    train = read.train
    typer.echo(f"{config}: good")
    typer.echo(f"  ranks   {plan.num_ranks} = {layout}; {plan}")
    typer.echo(
        f"  step    {train.global_batch} samples = {replicas_of(read, layout)} replica(s) x "
        f"{count} microbatch(es) x {size}"
    )
    if layout.pp > 1:
        typer.echo(f"  pipe    {describe_schedule(read, layout)}")
    typer.echo(f"  run     {train.steps} steps in {train.precision}, into {read.run.dir}")


@app.command()
def convert(
    file: Annotated[str, typer.Argument(help="DeepSpeed's JSON config", metavar="FILE.json")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Where to write it; else to the screen.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Data-parallel ranks, where the file leaves it open.")
    ] = None,
) -> None:
    """Turn a DeepSpeed config into one of bigtrain, and tell what is not the same."""
    from pathlib import Path

    from bigtrain.config.deepspeed.convert import convert as convert_file
    from bigtrain.config.deepspeed.write import report_lines, write_new, yaml_of

    conversion = convert_file(Path(file), ranks)
    text = yaml_of(conversion)
    if output is None:
        typer.echo(text)
    else:
        write_new(Path(output), text)
    for line in report_lines(conversion):
        typer.echo(line, err=output is None)
    if output is not None:
        typer.echo(f"written: {output}; look it over, then: bigtrain check {output}")


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="YAML file of a run that is meant to go there")
    ] = None,
    hosts: Annotated[str, typer.Option(help="Machines to examine by ssh, like a,b.")] = "",
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="By default one for each GPU, without GPUs one.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less, and less exactly.")] = False,
) -> None:
    """Tell what is wrong with this machine, or with all nodes of a Slurm job or of --hosts.

    Versions, clocks, room, kernels, devices, files, and every link between two nodes. The exit code
    is 1 if anything is wrong.
    """
    from pathlib import Path

    from bigtrain.comm.started import starter_of
    from bigtrain.config.load import load_config
    from bigtrain.config.schema import Config
    from bigtrain.doctor.findings import findings
    from bigtrain.doctor.report import report_lines
    from bigtrain.launch.doctor import examine, plan_of
    from bigtrain.launch.plan import find_allocation, find_hosts

    if (starter := starter_of()) is not None:
        raise BigtrainError(
            f"{starter} has started this as one of several ranks",
            why="doctor starts the ranks that it needs on all nodes itself",
            mend=f"call it once, without {starter}: in salloc, or in the script of a job",
        )
    names = find_hosts(hosts)
    read = load_config(config) if config is not None else Config()
    read, plan = plan_of(read, find_allocation(os.environ), names, ranks_per_node)
    if len(plan.nodes) == 1 and plan.start == "here":
        _describe_machine()
    else:
        _say(str(plan))
    beside = Path(read.run.dir).parent if config is not None else Path.cwd()
    measured = examine(read, plan, beside, quick)
    found = findings(measured, all_gpus=ranks_per_node is None)
    for line in report_lines(measured, found):
        typer.echo(line)
    raise typer.Exit(1 if found else 0)


def _describe_machine() -> None:
    """Tell what this machine has, and who does each operation here: a kernel, or torch."""
    import logging

    from bigtrain.ops.report import doctor_lines

    logging.getLogger("bigtrain").addHandler(logging.NullHandler())  # the report says it all
    for line in doctor_lines():
        typer.echo(line)
    typer.echo("")


@jobs.callback(invoke_without_command=True)
def jobs_list(context: typer.Context) -> None:
    """List the jobs of bigtrain in Slurm's queue."""
    from bigtrain.launch.jobs import job_lines
    from bigtrain.launch.slurm_commands import queued_jobs

    if context.invoked_subcommand is None:
        for line in job_lines(queued_jobs()):
            typer.echo(line)


@jobs.command("follow")
def jobs_follow(
    job: Annotated[str, typer.Argument(help="a job's number, or a run folder")],
) -> None:
    """Show the log of a job as it grows, until the job has ended."""
    from bigtrain.launch.jobs import number_to_follow

    raise typer.Exit(_follow(number_to_follow(job)))


@jobs.command("cancel")
def jobs_cancel(
    which: Annotated[list[str], typer.Argument(help="jobs' numbers, or run folders")],
) -> None:
    """Cancel jobs. A run that trains saves first, within the time that Slurm gives."""
    from bigtrain.launch.jobs import cancel

    for line in cancel(which):
        typer.echo(line)


@app.command()
def logs(
    run: Annotated[str, typer.Argument(help="a run folder")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes.")] = False,
) -> None:
    """Show the logs of all ranks as one; what several ranks say, once."""
    from bigtrain.launch.logs import show_logs

    with contextlib.suppress(KeyboardInterrupt):
        show_logs(run, typer.echo, follow)


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="a run folder")],
    follow: Annotated[bool, typer.Option("--follow", help="Tell again each second.")] = False,
) -> None:
    """Tell how a run with parameter servers is: servers, workers, rounds, speed, staleness."""
    import time
    from pathlib import Path

    from bigtrain.run_folder import RunFolder
    from bigtrain.server.status import read_status, status_lines

    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for line in status_lines(read_status(RunFolder(Path(run)).status), time.time()):
                typer.echo(line)
            if not follow:
                return
            time.sleep(1.0)
            typer.echo("")


@app.command()
def schema() -> None:
    """Print the JSON Schema of configs, for editors."""
    import json

    from bigtrain.config.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def schedule(
    name: Annotated[str, typer.Argument(help="a schedule, or a table", metavar="NAME|FILE.csv")],
    ranks: Annotated[int | None, typer.Option(help="Ranks of the pipeline, by default 4.")] = None,
    microbatches: Annotated[
        int | None, typer.Option(help="Microbatches of a step, by default 8.")
    ] = None,
    virtual_stages: Annotated[
        int | None, typer.Option(help="Stages per rank, for interleaved; by default 2.")
    ] = None,
    forward: Annotated[
        float, typer.Option(help="Time of a forward through all layers of a rank.")
    ] = 1,
    backward: Annotated[float, typer.Option(help="Time of a whole backward of them.")] = 2,
    weight: Annotated[
        float, typer.Option(help="The part of the backward that is for weight gradients.")
    ] = 1,
    transfer: Annotated[float, typer.Option(help="Time of a message between two ranks.")] = 0,
    compare: Annotated[
        str, typer.Option(help="Other schedules to set beside it, like gpipe,zb_h1.")
    ] = "",
    picture: Annotated[
        str | None, typer.Option(help="Where to draw it, .svg or .png; else schedule-NAME.svg.")
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Draw nothing.")] = False,
    csv: Annotated[str | None, typer.Option(help="Write the table, to edit and run it.")] = None,
) -> None:
    """Show a pipeline schedule on a clock: who does what when, its bubble, its memory."""
    import shutil

    from bigtrain.pipeline.report import (
        Wish,
        check_picture,
        draw_all,
        lines_of,
        results_of,
        write_csv,
    )

    if no_picture and picture is not None:
        raise BigtrainError("--picture and --no-picture exclude each other", mend="give one")
    check_picture(picture)
    times = (forward, backward, weight, transfer)
    results = results_of(Wish(name, ranks, microbatches, virtual_stages, *times, compare))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines_of(results, width):
        typer.echo(line)
    if csv is not None:
        write_csv(results[0], csv)
        typer.echo(f"table    {csv}")
    if not no_picture:
        typer.echo(f"picture  {draw_all(results, picture)}")


@ckpt.command("list")
def ckpt_list(folder: Folder) -> None:
    """List the checkpoints of a run, oldest first."""
    from bigtrain.checkpoint.report import list_lines

    for line in list_lines(folder):
        typer.echo(line)


@ckpt.command("inspect")
def ckpt_inspect(folder: Annotated[str, typer.Argument(help="a checkpoint, or a run")]) -> None:
    """Show what is in a checkpoint: state, tensors, blocks, files."""
    from bigtrain.checkpoint.report import inspect_lines

    for line in inspect_lines(folder):
        typer.echo(line)


@ckpt.command("verify")
def ckpt_verify(folder: Annotated[str, typer.Argument(help="a checkpoint, or a run")]) -> None:
    """Read every file of the checkpoints and compare it with its checksum."""
    from bigtrain.checkpoint.report import verify_lines

    lines, damaged = verify_lines(folder)
    for line in lines:
        typer.echo(line)
    raise typer.Exit(1 if damaged else 0)


def main() -> None:
    """Run a verb; errors made for the user have no traceback."""
    code = 0
    try:
        app()
    except BigtrainError as error:
        _say(f"error: {error}")
        code = error.exit_code
    except BrokenPipeError:
        code = 1
    try:
        sys.stdout.flush()
    except OSError:  # the reader of our output, head say, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
