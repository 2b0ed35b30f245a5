"""torchrun without its traceback where a process fails, for that process has said why; and deaf to Ctrl-C.

A terminal's Ctrl-C reaches the processes by itself: they save and end. A second one, passed on, would cut that short.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.disable(logging.ERROR)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(max(failure.exitcode, 1))
    except SignalException as error:
        sys.exit(128 + int(error.sigval))
