"""A resumed run computes as it did before, unless it is told otherwise.

And of itself only that run goes on which the same launch of processes began.
"""

import os

import pytest

from compressor.errors import CheckpointError
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import launch_of_environment
from compressor.run_directory import RunDirectory, write_json_atomically
from compressor.run_facts import as_it_began, is_of_this_launch


@pytest.fixture
def run_of(tmp_path):
    def begun(**environment):
        run = RunDirectory(tmp_path)
        write_json_atomically(run.environment, {"number_format": "float32"} | environment)
        return run

    return begun


@pytest.mark.parametrize(
    ("was_compiled", "asked", "expected"),
    [
        (True, "auto", "on"),
        (False, "auto", "off"),
        (True, "off", "off"),
        (False, "on", "on"),
    ],
)
def test_compiling_stays_as_it_was(run_of, was_compiled, asked, expected):
    run = run_of(is_compiled=was_compiled)
    assert as_it_began(run, PerformanceSettings(compile=asked)).compile == expected


def test_runs_from_before_compiling_are_not_compiled(run_of):
    assert as_it_began(run_of(), PerformanceSettings()).compile == "off"


def test_the_number_format_stays_and_no_other_is_taken(run_of):
    run = run_of(number_format="bfloat16")
    assert as_it_began(run, PerformanceSettings()).training_dtype == "bfloat16"
    with pytest.raises(CheckpointError, match="is trained in bfloat16, not in float32"):
        as_it_began(run, PerformanceSettings(training_dtype="float32"))


@pytest.mark.parametrize(
    ("num_processes", "asked", "expected"), [(1, None, 3), (1, 2, 2), (2, None, None)]
)
def test_threads_stay_where_the_processes_do(run_of, num_processes, asked, expected):
    run = run_of(num_threads=3, num_processes=num_processes)
    assert as_it_began(run, PerformanceSettings(num_threads=asked)).num_threads == expected


@pytest.mark.parametrize("content", ["[]", "{}", '{"number_format": 3}'])
def test_an_environment_that_does_not_say_the_format_is_damaged(run_of, content):
    run = run_of()
    run.environment.write_text(content)
    with pytest.raises(CheckpointError, match="is damaged: it does not say in which number format"):
        as_it_began(run, PerformanceSettings())


@pytest.fixture
def launched(monkeypatch):
    """This process, as `torchrun` starts one."""

    def by(parent, *, run_id="none", num_hosts=1):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("GROUP_WORLD_SIZE", str(num_hosts))
        monkeypatch.setattr("os.getppid", lambda: parent)
        return launch_of_environment()

    return by


def test_a_run_goes_on_by_itself_in_the_launch_that_began_it(run_of, launched):
    own = launched(os.getpid())
    run = run_of(launch=own)
    assert not is_of_this_launch(run)  # it was not even begun
    run.resolved_recipe.write_text("{}")
    assert is_of_this_launch(run)
    for other in ("another launch", None):
        write_json_atomically(run.environment, {"launch": other})
        assert not is_of_this_launch(run)


def test_who_was_not_launched_goes_on_with_nothing_by_itself(run_of, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    run = run_of(launch=None)
    run.resolved_recipe.write_text("{}")
    assert launch_of_environment() is None
    assert not is_of_this_launch(run)


def test_launchers_of_one_host_are_told_apart_and_those_of_several_by_their_name(launched):
    one, other = launched(os.getpid()), launched(1)
    assert one == launched(os.getpid()) != other
    assert launched(os.getpid(), run_id="job 7", num_hosts=2) == "job 7"
