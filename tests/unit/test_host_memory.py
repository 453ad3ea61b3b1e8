"""Free memory within the limits of Slurm and Kubernetes, from pretended files of Linux."""

import os

import pytest

from compressor.host_memory import reachable_bytes

GIB = 2**30
OWN_BYTES = 3 * os.sysconf("SC_PAGE_SIZE")
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.fixture
def linux(tmp_path):
    """A machine with 8 GiB free, this process of three pages, and control groups as given."""

    def make(cgroup, **groups):
        def write(path, text):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)

        write("proc/meminfo", f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
        write("proc/self/statm", "900 3 2 1 0 1 0\n")
        write("proc/self/cgroup", cgroup)
        for folder, files in groups.items():
            for name, text in files.items():
                write(f"{folder}/{name}", text)
        return tmp_path

    return make


def version_1(limit, used, cache=0):
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": f"inactive_file 77\ntotal_inactive_file {cache}\n",
    }


def version_2(limit, used, cache=0):
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {cache}\nactive_file 9\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "groups", "free_gib"),
    [
        ("", {}, 8),
        ("0::/\n", {V2: version_2("max", 5)}, 8),
        ("0::/\n", {V2: version_2(4 * GIB, GIB)}, 3),
        ("0::/\n", {V2: version_2(4 * GIB, 3 * GIB, cache=2 * GIB)}, 3),
        ("0::/\n", {V2: version_2(4 * GIB, 5 * GIB)}, 0),
        ("0::/\n", {V2: version_2(64 * GIB, GIB)}, 8),
        ("0::/job/step\n", {f"{V2}/job/step": version_2(5 * GIB, GIB)}, 4),
        (
            "0::/job/step\n",
            {f"{V2}/job": version_2(3 * GIB, GIB), f"{V2}/job/step": version_2("max", GIB)},
            2,
        ),
        ("5:cpu:/x\n4:memory:/slurm/job\n", {f"{V1}/slurm/job": version_1(5 * GIB, GIB)}, 4),
        ("4:cpu,memory:/\n", {V1: version_1(5 * GIB, GIB, cache=GIB // 2)}, 4.5),
        ("4:memory:/docker/named/outside\n0::/\n", {V1: version_1(5 * GIB, 4 * GIB)}, 1),
        ("4:memory:/\n", {V1: version_1(2**63 - 4096, GIB)}, 8),
    ],
)
def test_the_smallest_limit_counts(linux, cgroup, groups, free_gib):
    assert reachable_bytes(linux(cgroup, **groups)) == free_gib * GIB + OWN_BYTES


def test_elsewhere_all_memory_counts(tmp_path):
    built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert reachable_bytes(tmp_path) == built_in


def test_of_this_machine_it_is_a_part():
    built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < reachable_bytes() <= 1.01 * built_in
