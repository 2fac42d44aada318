"""One local Ray cluster of two CPUs for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graft.runtime.session import RaySession, ray_session


@pytest.fixture(scope="package", autouse=True)
def ray_cluster() -> Iterator[RaySession]:
    """The cluster; sessions that tests open are this one.

    Its processes are no less urgent than the other tests: by default Ray gives way to both.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        with ray_session(num_cpus=2) as session:
            yield session
