"""What `bigtrain doctor` starts on the nodes: `python -m bigtrain.doctor.rank wish.json`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from bigtrain.lifetime import StopRequest, die_with_launcher, report_failure, report_success
from bigtrain.train import exit_now


def main() -> int:
    """Run one rank to its end and return the exit code of the process."""
    die_with_launcher()
    try:
        StopRequest()
        logging.getLogger("bigtrain").addHandler(logging.NullHandler())  # the report says it all
        from bigtrain.doctor.examine import examine  # imports torch; signals are handled already

        examine(Path(sys.argv[1]))
        report_success()
        return 0
    except BaseException as error:  # nobody leaves silently
        return report_failure(error)


if __name__ == "__main__":
    exit_now(main())
