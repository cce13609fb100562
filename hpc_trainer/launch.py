"""torchrun without its traceback: a training process has already said what is wrong, on one screen.

``python -m hpc_trainer.launch TORCHRUN-ARGUMENTS`` ends with the exit code of the process that failed first.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from fl_core.contracts.errors import ExitCode


def main(arguments: Sequence[str]) -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode)
    except (SignalException, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
