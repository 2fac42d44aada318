"""DeepSpeed's C++ ops: built once, before training starts; a training process only loads them.

Left alone, DeepSpeed compiles an op at its first use, in the middle of a run, and a build that is
killed leaves torch's lock file behind, for which every later build waits for ever. Here an op is
built ahead, in a folder whose name stands for everything that the binary depends on, and a
training process takes the finished library or says what is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graft.core.errors import MissingDependencyError
from graft.core.files import sha256_json, write_json
from graft.core.process import environment
from graft.core.progress import QUIET, Progress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from graft.recipe.sections import ScaleSection

Op = Literal["cpu_adam", "pin_memory", "async_io"]

OPS: tuple[Op, ...] = ("cpu_adam", "pin_memory", "async_io")
"""In the order in which they are loaded: `async_io` takes symbols of `pin_memory`."""

_BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "pin_memory": "PinMemoryBuilder",
    "async_io": "AsyncIOBuilder",
}
_QUIET_S = 1200.0
"""A build elsewhere (another container, a network disk) that wrote nothing for so long is dead."""

_log = logging.getLogger(__name__)


def import_deepspeed() -> Any:
    """Imports DeepSpeed without its noise and without compiling what training does not use."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Its shared-memory all-reduce serves inference only, and would compile for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def ops_of(scale: ScaleSection) -> tuple[Op, ...]:
    """Names the ops that a run with these settings calls."""
    places = (scale.offload.optimizer, scale.offload.parameters)
    wanted = {"cpu_adam"} if scale.offload.optimizer != "none" else set()
    if "nvme" in places:
        wanted |= {"pin_memory", "async_io"}
    return tuple(op for op in OPS if op in wanted)


def extensions_root() -> Path:
    """Where torch and its companions keep what they compile."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def ops_folder() -> Path:
    """Where ops for this Python, torch, DeepSpeed and processor are."""
    depends_on = [platform.python_version(), version("torch"), version("deepspeed"), _processor()]
    return extensions_root() / f"graft-{sha256_json(depends_on)[:12]}"


def is_built(op: Op) -> bool:
    """Tells whether an op can be loaded in this process's surroundings."""
    return _library(op) is not None


def obstacle(op: Op) -> str | None:
    """Says what is missing to build an op here, with what to install; None where nothing is."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "there is no C++ compiler; install g++"
    with _build_path():
        if shutil.which("ninja") is None:
            return "there is no ninja; pip install ninja"
    if op == "async_io" and not _has_libaio(compiler):
        return "libaio and its headers are absent; apt install libaio-dev (or libaio-devel)"
    return None


def build_ops(ops: Iterable[Op], progress: Progress = QUIET) -> None:
    """Builds what is not built; other processes of this machine wait for the one that does.

    Takes 2 minutes for `cpu_adam` and up to 8 for `async_io`, on two cores.

    Raises:
        MissingDependencyError: A compiler or a library is missing, or the build fails.
    """
    import filelock

    missing = [op for op in OPS if op in set(ops) and not is_built(op)]
    if not missing:
        return
    for op in missing:
        if reason := obstacle(op):
            raise MissingDependencyError(f"DeepSpeed's op {op} cannot be built here: {reason}")
    folder = ops_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".building"):
        for op in missing:
            if not is_built(op):
                _clear_remains(folder / op)
                _build(op, folder, progress)


def load_ops(ops: Iterable[Op]) -> None:
    """Gives DeepSpeed its finished ops, so that it compiles nothing. Called in training processes.

    Raises:
        MissingDependencyError: One is not built.
    """
    wanted = set(ops)
    for op in (op for op in OPS if op in wanted):
        found = _library(op)
        if found is None:
            raise MissingDependencyError(
                f"DeepSpeed's op {op}, which scale.offload needs, is not built on "
                f"{platform.node()}; build it there once with `graft doctor --build-ops`"
            )
        builder = _builder(op)
        name, path = found
        if op not in builder._loaded_ops:
            builder._loaded_ops[op] = _imported(name, path)
        builder.load()


def stale_locks() -> list[Path]:
    """Finds the locks of builds that were killed: nobody compiles, and later builds would wait."""
    root = extensions_root()
    found = sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})
    return [lock for lock in found if _is_stale(lock)]


def clear_stale_locks() -> list[Path]:
    """Removes those locks; returns them."""
    return [lock for lock in stale_locks() if _clear(lock)]


def _library(op: Op) -> tuple[str, Path] | None:
    """Module name and file of a finished op."""
    try:
        stamp = json.loads((ops_folder() / f"{op}.json").read_text())
        name, path = str(stamp["module"]), Path(stamp["library"])
    except (OSError, ValueError, KeyError):
        return None
    return (name, path) if path.is_file() else None


def _build(op: Op, folder: Path, progress: Progress) -> None:
    import_deepspeed()
    builder = _builder(op)
    num_files = len(builder.sources()) + 1
    _log.info("building DeepSpeed's op %s in %s", op, folder)
    done = threading.Event()
    with (
        progress.task(f"building {op}", num_files, "file") as task,
        environment(TORCH_EXTENSIONS_DIR=str(folder)),
        _build_path(),
    ):

        def follow() -> None:
            seen = 0
            while not done.wait(1.0):
                count = len([*(folder / op).glob("*.o"), *(folder / op).glob("*.so")])
                task.advance(count - seen)
                seen = count

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            module = builder.load(verbose=False)
        except Exception as error:  # torch, ninja and the linker raise many kinds
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise MissingDependencyError(
                f"DeepSpeed's op {op} does not build here: {words[-1]}; the compiler's words are "
                f"in the log of `ninja -C {folder / op}`"
            ) from error
        finally:
            done.set()
            follower.join()
    stamp = {"module": module.__name__, "library": str(module.__file__)}
    write_json(folder / f"{op}.json", stamp)


def _builder(op: Op) -> Any:
    return getattr(importlib.import_module("deepspeed.ops.op_builder"), _BUILDERS[op])()


def _imported(name: str, path: Path) -> Any:
    import torch  # noqa: F401 - the library takes torch's symbols

    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build_path() -> Any:
    """Puts the environment's own tools in reach: ninja lies beside its Python."""
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    return environment(PATH=os.pathsep.join(folders))


def _has_libaio(compiler: str) -> bool:
    program = b"#include <libaio.h>\nint main() { return io_queue_init(1, 0); }\n"
    command = [compiler, "-x", "c++", "-", "-laio", "-o", os.devnull]
    return subprocess.run(command, input=program, capture_output=True).returncode == 0


def _processor() -> str:
    """What `-march=native` means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x for x in lines if x.startswith(("flags", "Features"))), platform.processor())


def _is_stale(lock: Path) -> bool:
    """A process that compiles has its lock, or the folder of its lock, open all the time."""
    try:
        if os.getuid() not in (0, lock.stat().st_uid) or _is_in_use(lock.parent):
            return False
        if lock.is_relative_to(ops_folder()):
            return not _is_building(ops_folder())
        newest = max(file.stat().st_mtime for file in (lock, *lock.parent.iterdir()))
    except FileNotFoundError:  # released meanwhile
        return False
    return time.time() - newest > _QUIET_S


def _is_building(folder: Path) -> bool:
    """Tells whether a build of ours runs, in whatever container: file locks reach across them."""
    import filelock

    try:
        with filelock.FileLock(folder / ".building", timeout=0):
            return False
    except filelock.Timeout:
        return True


def _is_in_use(folder: Path) -> bool:
    import psutil

    for process in psutil.process_iter():
        try:
            places = [process.cwd(), *(file.path for file in process.open_files())]
        except (psutil.Error, OSError):  # ended meanwhile, or another user's
            continue
        if any(Path(place).is_relative_to(folder) for place in places if place):
            return True
    return False


def _clear_remains(folder: Path) -> None:
    """Makes way for a build, while no other one of ours can run.

    The compiler that a killed process had started may still be at work, and ends by itself.
    """
    lock = folder / "lock"
    deadline = time.monotonic() + _QUIET_S
    while lock.exists() and _is_in_use(folder) and time.monotonic() < deadline:
        time.sleep(1.0)
    _clear(lock)


def _clear(lock: Path) -> bool:
    if not lock.exists():
        return False
    _log.warning("removing %s, left by a build that was killed", lock)
    lock.unlink(missing_ok=True)
    return True
