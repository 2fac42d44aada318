"""What this machine offers: versions of what GRAFT stands on, devices, room, leftovers."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from graft.core.errors import ConfigError, GraftError
from graft.core.files import require_writable
from graft.core.model import Listed, StrictModel
from graft.core.progress import QUIET, Progress
from graft.pipelines.support import Support, inspect_support

if TYPE_CHECKING:
    from graft.engine.backends.ops import Op

PACKAGES = (
    "graft",
    "torch",
    "ray",
    "transformers",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "optuna",
    "datasets",
)

_GIB = 2**30
_MISSING = "missing packages"
_MIN_MEMORY_BYTES = 4 * _GIB
_MIN_SHARED_BYTES = _GIB
_MIN_DISK_BYTES = 5 * _GIB


class Versions(StrictModel):
    """Package name → version; `absent` where a package is not installed."""

    packages: dict[str, str]


def read_versions() -> Versions:
    """Reads versions from package metadata; imports nothing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return Versions(packages=found)


class Finding(StrictModel):
    """One thing that was looked at."""

    subject: str
    status: Literal["ok", "note", "broken"]
    """`note` costs speed or a feature; `broken` stops GRAFT."""
    found: str
    fix: str = ""


class Health(StrictModel):
    """What `graft doctor` found."""

    findings: Listed[Finding]
    support: Support | None = None
    """None where torch does not load."""

    @property
    def refusal(self) -> ConfigError | None:
        """Says what is broken, or nothing."""
        broken = [finding.subject for finding in self.findings if finding.status == "broken"]
        return ConfigError(f"broken: {', '.join(broken)}") if broken else None


def inspect_environment(home: Path, *, build: bool = False, progress: Progress = QUIET) -> Health:
    """Looks at packages, devices, compilers, memory, disk and what earlier runs left behind.

    Args:
        home: Where runs would be kept.
        build: Builds DeepSpeed's ops first, and clears what killed builds left.
        progress: Told of the builds.
    """
    packages = _packages()
    findings = [
        *packages,
        _devices(),
        _compilers(),
        *(_ops(build, progress) if packages[-1].status == "ok" else []),
        _threads(),
        _memory(),
        _shared_memory(),
        *_disk(home),
    ]
    loads = all(f.status != "broken" for f in findings if f.subject in ("torch", _MISSING))
    return Health(findings=tuple(findings), support=inspect_support() if loads else None)


def _packages() -> list[Finding]:
    versions = read_versions().packages
    absent = [name for name, found in versions.items() if found == "absent"]
    present = ", ".join(f"{name} {found}" for name, found in versions.items() if name not in absent)
    findings = [Finding(subject="packages", status="ok", found=present)]
    if absent:
        findings.append(
            Finding(
                subject=_MISSING,
                status="broken",
                found=", ".join(absent),
                fix=f"pip install {' '.join(absent)}",
            )
        )
    return findings


def _devices() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(
            subject="torch",
            status="broken",
            found=str(error),
            fix="reinstall torch for this machine",
        )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found = f"CUDA {torch.version.cuda}: {', '.join(names)}"
        return Finding(subject="devices", status="ok", found=found)
    return Finding(
        subject="devices",
        status="note",
        found="CPU only",
        fix="a GPU is found when its driver and a CUDA build of torch are installed",
    )


def _compilers() -> Finding:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return Finding(subject="C++ compiler", status="ok", found=compiler)
    return Finding(
        subject="C++ compiler",
        status="note",
        found="none",
        fix="install g++: DeepSpeed's optimizer for scale.offload is compiled here, once",
    )


def _ops(build: bool, progress: Progress) -> list[Finding]:
    from graft.engine.backends.ops import OPS, clear_stale_locks, is_built, obstacle, stale_locks

    findings = []
    for lock in clear_stale_locks() if build else stale_locks():
        found = f"{lock}, left by a build that was killed"
        if build:
            findings.append(Finding(subject="build lock", status="ok", found=f"{found}; removed"))
        else:
            fix = "later builds would wait for it for ever; graft doctor --build-ops removes it"
            finding = Finding(subject="build lock", status="note", found=found, fix=fix)
            findings.append(finding)
    for op in OPS:
        if not is_built(op) and (reason := obstacle(op)):
            found, _, fix = reason.partition("; ")
            subject = f"DeepSpeed's {op}"
            findings.append(Finding(subject=subject, status="note", found=found, fix=fix))
        else:
            findings.append(_op(op, build, progress))
    return findings


def _op(op: Op, build: bool, progress: Progress) -> Finding:
    """An op that is built or can be."""
    from graft.engine.backends.ops import build_ops, is_built, ops_folder

    subject = f"DeepSpeed's {op}"
    if build:
        try:
            build_ops((op,), progress)
        except GraftError as error:
            return Finding(subject=subject, status="broken", found=str(error))
    if is_built(op):
        return Finding(subject=subject, status="ok", found=f"built in {ops_folder()}")
    fix = "scale.offload builds it on every node before workers start; graft doctor --build-ops now"
    return Finding(subject=subject, status="note", found="not built", fix=fix)


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = os.environ.get("OMP_NUM_THREADS")
    found = f"{cores} cores, OMP_NUM_THREADS {given or 'not set (GRAFT sets it for each process)'}"
    return Finding(subject="processor", status="ok", found=found)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    if memory.available >= _MIN_MEMORY_BYTES:
        return Finding(subject="memory", status="ok", found=found)
    fix = "free 4 GiB: Ray and one small model need about that"
    return Finding(subject="memory", status="note", found=found, fix=fix)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(subject="shared memory", status="ok", found="not used on this system")
    free = shutil.disk_usage(path).free
    found = f"{free / _GIB:.1f} GiB free in {path}"
    if free >= _MIN_SHARED_BYTES:
        return Finding(subject="shared memory", status="ok", found=found)
    fix = "in a container, start it with --shm-size=2g; Ray falls back to slow disk otherwise"
    return Finding(subject="shared memory", status="note", found=found, fix=fix)


def _disk(home: Path) -> list[Finding]:
    try:
        require_writable(home, "the home")
    except ConfigError as error:
        return [Finding(subject="home", status="broken", found=str(error), fix="choose --home")]
    free = shutil.disk_usage(home).free
    found = f"{home}, {free / _GIB:.1f} GiB free"
    if free >= _MIN_DISK_BYTES:
        return [Finding(subject="home", status="ok", found=found)]
    fix = "free 5 GiB, or choose another disk with --home"
    return [Finding(subject="home", status="note", found=found, fix=fix)]
