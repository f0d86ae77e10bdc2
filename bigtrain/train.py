"""What each rank runs: `python -m bigtrain.train config.yaml [--resume] [section.key=value ...]`.

`bigtrain launch` starts it; torchrun, srun and mpiexec can, too.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from bigtrain.comm.started import adopt
from bigtrain.errors import Stopped
from bigtrain.lifetime import StopRequest, die_with_launcher, report_failure, report_success
from bigtrain.server.environment import is_server


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank to its end and return the exit code of the process."""
    parser = argparse.ArgumentParser(prog="python -m bigtrain.train")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--restart", action="store_true", help="move an old run aside first")
    options = parser.parse_intermixed_args(arguments)
    die_with_launcher()
    started = None
    try:
        stop = StopRequest()
        if is_server():
            from bigtrain.serve import serve

            serve(options.config, options.overrides, stop)
            report_success()
            return 0
        started = adopt()
        from bigtrain.run import run  # imports torch; signals are handled already

        run(options.config, options.overrides, options.resume, options.restart, stop)
        report_success()
        if started is not None:
            started.finish()
        return 0
    except BaseException as error:  # also SystemExit of the user's code: nobody leaves silently
        code = report_failure(error)
        if started is not None and isinstance(error, Stopped):
            started.finish()
        elif started is not None:
            started.abort(code)  # MPI would wait for this rank for ever
        return code


def exit_now(code: int) -> NoReturn:
    """End the process at once: backends may wait at exit for ranks that are gone."""
    for last_word in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError, ValueError):
            last_word()
    os._exit(code)


if __name__ == "__main__":
    exit_now(main())
