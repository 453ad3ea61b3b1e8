"""`--nproc`: the same command in several processes of this machine, by torch's own launcher.

A process that is killed ends the others, and all begin anew from the last checkpoint. One that ends
with an error has said why, and ends the others for good.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from compressor.errors import (
    ExitCode,
    InterruptedRunError,
    LostProcessError,
    RobustCompressError,
    RunError,
    UsageError,
)

OPTION = "--nproc"
_NUM_PROCESSES = "ROBUST_COMPRESS_NPROC"
"""Tells the processes that this module started them, and how many."""
_RESTART = "ROBUST_COMPRESS_RESTART"
"""Tells them how often they were started before."""
_WAIT_FOR_THE_FIRST_SECONDS, _WAIT_FOR_THE_CAUSE_SECONDS = 2.0, 5.0
_LOUD = (
    "torch.distributed.elastic",
    "torch.distributed.elastic.agent.server.api",
    "torch.multiprocessing.spawn",
)
LOADED_ONCE = (
    "compressor.training_workflow",
    "compressor.verification_workflow",
    "torch._dynamo",  # torch's optimisers load it
)
"""By one process, of which those that work are forks. None of it may ask for a GPU: a fork of a
process that has done so can use none."""


def run_in_processes(num_processes: int, *, num_restarts: int) -> int:
    """Run the command line of this process in others; each takes part of the work.

    Returns:
        0, or the exit code of that process which ended first with another one.

    Raises:
        UsageError: if this process is one of several already.
        RunError: if they were killed more often than they may be started again.
    """
    if is_one_of_several():
        raise UsageError(f"{OPTION} is for commands that torchrun did not start; leave it out")
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they say, we say
    os.environ[_NUM_PROCESSES] = str(num_processes)
    try:
        for restart in range(num_restarts + 1):
            os.environ[_RESTART] = str(restart)
            first, code = _launch(num_processes)
            if code >= 0:
                return code
    finally:
        del os.environ[_NUM_PROCESSES], os.environ[_RESTART]
    raise RunError(
        f"process {first} of {num_processes} was killed by signal {-code}, {num_restarts} restarts "
        "included; what is in the last checkpoint is kept. Look for memory (`dmesg`), or take "
        f"fewer with {OPTION}"
    )


def _launch(num_processes: int) -> tuple[int, int]:
    """Which process ended first otherwise than well, and its exit code: minus its signal, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="robust-compress",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # it would also start again what ended with an error
        monitor_interval=0.1,
        start_method="forkserver",
    )
    multiprocessing.set_forkserver_preload(list(LOADED_ONCE))
    theirs, ours = multiprocessing.Pipe(duplex=False)
    try:
        elastic_launch(config, call_main)(without_option(sys.argv[1:]), theirs)
    except SignalException as caught:
        is_term = caught.sigval == signal.SIGTERM
        return 0, int(ExitCode.TERMINATED if is_term else ExitCode.INTERRUPTED)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return rank, failure.exitcode
    finally:
        theirs.close()
        ours.close()
    return 0, 0


def call_main(arguments: Sequence[str], launcher: Connection) -> None:
    """In each of the processes: the command; a process that does not end well ends at once.

    Args:
        arguments: of its command line.
        launcher: on which nothing comes, until the launcher is gone, however it ended.
    """
    from cli.main import main

    threading.Thread(target=_stop_without, args=[launcher], daemon=True).start()
    sys.argv = ["robust-compress", *arguments]
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    if code != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # or the launcher would wait for the others, who wait for this one


def _stop_without(launcher: Connection) -> None:
    """As at Ctrl-C: no one is left to start this process again, or to end it with the others."""
    launcher.poll(None)
    os.kill(os.getpid(), signal.SIGINT)


def has_to_speak(error: RobustCompressError) -> bool:
    """Whether this process prints an error, once those have spoken who know the cause or the same.

    The launcher ends the others as soon as one has ended with an error, so that mostly one speaks.
    """
    if isinstance(error, LostProcessError):
        time.sleep(_WAIT_FOR_THE_CAUSE_SECONDS)
    elif isinstance(error, InterruptedRunError):  # all have agreed to stop
        return is_first()
    elif not is_first():
        time.sleep(_WAIT_FOR_THE_FIRST_SECONDS)
    return True


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
    return int(os.environ.get(_RESTART) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_first() -> bool:
    """Whether this process speaks for all."""
    return rank() == 0


def rank() -> int:
    """The place of this process among those of its command, from 0."""
    return int(os.environ.get("RANK", "0"))
