"""`--nproc`: the same command in several processes of this machine, by torch's own launcher.

A process that is killed ends the others, and all begin anew from the last checkpoint.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from compressor.errors import ExitCode, RunError, UsageError

OPTION = "--nproc"
_NUM_PROCESSES = "ROBUST_COMPRESS_NPROC"
"""Tells the processes that this module started them, and how many."""
_LOUD = (
    "torch.distributed.elastic",
    "torch.distributed.elastic.agent.server.api",
    "torch.multiprocessing.spawn",
)


def run_in_processes(num_processes: int, *, num_restarts: int) -> int:
    """Run the command line of this process in others; each takes part of the work.

    Returns:
        The exit code of the first of them, which speaks for all.

    Raises:
        UsageError: if this process is one of several already.
        RunError: if they were killed more often than they may be started again.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if is_one_of_several():
        raise UsageError(f"{OPTION} is for commands that torchrun did not start; leave it out")
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they say, we say
    os.environ[_NUM_PROCESSES] = str(num_processes)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="robust-compress",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=num_restarts,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        codes: dict[int, int] = elastic_launch(config, call_main)(without_option(sys.argv[1:]))
    except SignalException as caught:
        is_term = caught.sigval == signal.SIGTERM
        return int(ExitCode.TERMINATED if is_term else ExitCode.INTERRUPTED)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RunError(
            f"process {rank} of {num_processes} ended with {failure.exitcode}, {num_restarts} "
            "restarts included; what is in the last checkpoint is kept. Look for memory (`dmesg`), "
            f"or take fewer with {OPTION}"
        ) from None
    finally:
        del os.environ[_NUM_PROCESSES]
    return codes[0]


def call_main(arguments: Sequence[str]) -> int:
    """In each of the processes: the command, and the exit code that it ends with."""
    from cli.main import main

    sys.argv = ["robust-compress", *arguments]
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    if code in {ExitCode.INTERRUPTED, ExitCode.TERMINATED}:
        sys.stdout.flush()
        os._exit(code)  # or it would wait for the launcher, which waits for it
    return code


def without_option(arguments: Sequence[str]) -> list[str]:
    """The same command line for one process."""
    kept, words = [], iter(arguments)
    for word in words:
        if word == OPTION:
            next(words, None)
        elif not word.startswith(f"{OPTION}="):
            kept.append(word)
    return kept


def option_in_use() -> int | None:
    """With how many processes this one was started by `--nproc`, for commands to type."""
    number = os.environ.get(_NUM_PROCESSES)
    return None if number is None else int(number)


def is_one_of_several() -> bool:
    """Whether torch's launcher started this process, for `--nproc` or by `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def num_restarts_until_now() -> int:
    """How often torch's launcher has begun anew, after one of its processes was killed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"
