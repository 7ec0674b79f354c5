"""The memory that is left is the least of the machine's and of what each group's limit leaves."""

import pytest

from birdcall.data.loader import available_memory


@pytest.fixture
def system(tmp_path):
    """Write files of /proc and /sys below a folder."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return write


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 8000 kB\n"}


def test_without_limits_the_machines_memory_counts(system):
    groups = {
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": "max\n",
        "sys/fs/cgroup/job/memory.current": "5\n",
    }
    assert available_memory(system(MACHINE | groups)) == 8000 * 1024


def test_a_limit_of_version_2_leaves_what_is_not_used_or_can_be_given_back(system):
    groups = {
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": "3000000\n",
        "sys/fs/cgroup/job/memory.current": "1000000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 600000\ninactive_file 300000\nactive_file 7\n",
    }
    assert available_memory(system(MACHINE | groups)) == 2_300_000


def test_a_limit_of_version_1_counts_too(system):
    groups = {
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/host/name\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 9\ntotal_inactive_file 500000\n",
    }
    assert available_memory(system(MACHINE | groups)) == 3_500_000


def test_the_limit_of_an_outer_group_holds_for_an_inner_one(system):
    groups = {
        "proc/self/cgroup": "0::/slice/job\n",
        "sys/fs/cgroup/slice/job/memory.max": "max\n",
        "sys/fs/cgroup/slice/job/memory.current": "1\n",
        "sys/fs/cgroup/slice/memory.max": "500\n",
        "sys/fs/cgroup/slice/memory.current": "600\n",
    }
    assert available_memory(system(MACHINE | groups)) == 0


def test_a_system_that_says_nothing_has_no_known_limit(tmp_path):
    assert available_memory(tmp_path) is None


def test_this_machine_says_something_plausible():
    assert available_memory() is None or available_memory() > 1e6
