import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft.core.errors import ConfigError
from graft.engine.backends.nvme import filesystem_type, require_nvme, swap_folder

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/export {data} nfs4 rw 0 0
/dev/nvme0n1 {data}/fast xfs rw 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    """A table with a network disk, and a local one mounted on it."""
    (tmp_path / "data" / "fast").mkdir(parents=True)
    table = tmp_path / "mounts"
    table.write_text(MOUNTS.format(data=tmp_path / "data"))
    return table


def test_the_innermost_disk_counts(tmp_path: Path, mounts: Path) -> None:
    assert filesystem_type(tmp_path, mounts) == "ext4"
    assert filesystem_type(tmp_path / "data", mounts) == "nfs4"
    assert filesystem_type(tmp_path / "data" / "fast", mounts) == "xfs"
    assert filesystem_type(tmp_path, tmp_path / "no table") is None


def test_a_space_in_the_name_of_a_disk_is_read(tmp_path: Path) -> None:
    disk = tmp_path / "fast disk"
    disk.mkdir()
    table = tmp_path / "mounts"
    table.write_text(
        f"/dev/sda1 / ext4 rw 0 0\nnas {str(disk).replace(' ', chr(92) + '040')} nfs rw\n"
    )
    assert filesystem_type(disk, table) == "nfs"


def test_a_folder_that_can_be_swapped_to_is_left_as_it_was(tmp_path: Path, mounts: Path) -> None:
    fast = tmp_path / "data" / "fast"
    require_nvme(fast, 1000, mounts=mounts)
    assert list(fast.iterdir()) == []


def test_a_folder_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"offload.nvme_path: there is no folder .*away; make it"):
        require_nvme(tmp_path / "away", 0)
    assert not (tmp_path / "away").exists()


def test_a_network_disk_is_refused(tmp_path: Path, mounts: Path) -> None:
    with pytest.raises(ConfigError, match=r"is on a network disk \(nfs4\).*use cpu"):
        require_nvme(tmp_path / "data", 0, mounts=mounts)


def test_a_full_disk_is_refused_with_both_sizes(tmp_path: Path, mounts: Path) -> None:
    fast = tmp_path / "data" / "fast"
    with pytest.raises(ConfigError, match=r"has .*B free and up to 1000 TB will be written there"):
        require_nvme(fast, 10**15, mounts=mounts)


def test_a_folder_that_nobody_may_write_is_refused_by_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"choose another folder with scale\.offload\.nvme_path"):
        require_nvme(Path("/proc"), 0, mounts=tmp_path / "no table")


def test_what_a_killed_process_left_is_no_reason_to_call_a_disk_full(
    tmp_path: Path, mounts: Path
) -> None:
    fast = tmp_path / "data" / "fast"
    owner = Owner()
    held, left = swap_folder(fast, owner), fast / "graft-swap-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "moments").write_bytes(bytes(1000))
    require_nvme(fast, 1000, mounts=mounts)
    assert list(fast.iterdir()) == [held]


class Owner:
    pass


def test_a_process_swaps_in_a_folder_of_its_own_that_goes_with_its_owner(tmp_path: Path) -> None:
    first, second = Owner(), Owner()
    one, two = swap_folder(tmp_path, first), swap_folder(tmp_path, second)
    assert one != two
    (one / "weights.swp").write_bytes(b"x")
    del first
    gc.collect()
    assert not one.exists()
    assert two.exists()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; "
        "from graft.engine.backends.nvme import swap_folder; "
        "swap_folder(Path(sys.argv[1]), os); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=dict(os.environ))
    (left,) = tmp_path.iterdir()
    owner = Owner()
    assert list(tmp_path.iterdir()) != []
    assert swap_folder(tmp_path, owner) != left
    assert not left.exists()
