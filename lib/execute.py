"""Execute one chapter with papermill: alone on its target, to be stopped at any moment, with a manifest beside it."""
import os
import signal
import time
from contextlib import contextmanager

from lib import claims, cost, records
from lib.lock import Held, hold


class RunError(RuntimeError):
    """A run that failed, told in one line."""


# glibc keeps freed memory instead of mapping it anew at every pass: a forward pass without gradients is 2 to 3.5 times as fast
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


@contextmanager
def environment(**variables):
    """What the kernel has to know: its chapter and its tier; dask, too, leaves variables behind that end here."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def stoppable(minutes=None):
    """SIGTERM ends like Ctrl-C, and so does the end of `minutes`: the kernel is asked to stop and writes its checkpoint."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_REAL, 60 * (minutes or 0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def aside(target):
    """Where a run is written until it has succeeded: ``_build/running/``, named by its target."""
    return claims.project_root() / "_build" / "running" / os.path.relpath(target, claims.project_root()).replace(os.sep, "-")


@contextmanager
def alone(target, wait=False):
    """Hold the right to write `target`; the system takes it back when the process ends, however it ends.

    Where another process holds it: RunError, or with `wait` wait until it is free.
    """
    try:
        with hold(aside(target).with_suffix(".lock"), -1 if wait else 0):
            yield
    except Held as other:
        raise RunError(f"{os.path.relpath(target, claims.project_root())} is being written by process {other.holder}; "
                       "wait for it, or stop it: what it has trained is kept") from None


def execute(name, parameters, target, tier="fast", deviations=(), progress=True):
    """Execute chapter `name` with papermill into `target` and write its manifest beside it; the caller is `alone` there.

    The target changes only when the run has succeeded; a failed run is kept under ``_build/failed``.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    running, costs = aside(target), aside(target).with_suffix(".cost")
    running.parent.mkdir(parents=True, exist_ok=True)
    start, before = time.perf_counter(), records.parts(name, parameters)
    try:
        with environment(REPRO_NOTEBOOK=name, REPRO_TIER=tier, REPRO_COST=str(costs), PYTHONHASHSEED="0",
                         REPRO_FROM=os.getcwd(), **KEPT_MEMORY, **({"REPRO_GIVEN": "1"} if parameters else {})):
            papermill.execute_notebook(str(records.path("source", name)), str(running), parameters=parameters,
                                       cwd=str(records.path("source", name).parent), progress_bar=progress,
                                       kernel_name="python3", language="python", autosave_cell_every=30,
                                       extra_arguments=["--log-level=40",     # not its warning about plain TCP
                                                        f"--IPKernelApp.exec_lines={cost.STARTUP}"])
        spent = records.read(costs) if costs.exists() else {}
        record = records.manifest(name, parameters, tier, time.perf_counter() - start, spent, before, deviations)
        # in this order, so that a manifest never stands beside another run's notebook
        target.with_suffix(".json").unlink(missing_ok=True)
        records.write(target, running.read_text(encoding="utf-8"))
        records.write(target.with_suffix(".json"), record)
        return record
    except PapermillExecutionError as error:
        kept = claims.project_root() / "_build" / "failed" / f"{name}.ipynb"
        kept.parent.mkdir(parents=True, exist_ok=True)
        running.replace(kept)
        raise RunError(f"{name}: {error.ename}: {str(error.evalue).splitlines()[0] if error.evalue else ''} "
                       f"(cell {error.exec_count}; see {kept.relative_to(claims.project_root())})") from None
    except DeadKernelError:
        raise RunError(f"{name}: its kernel died, killed or out of memory; the same command goes on from the last checkpoint") from None
    finally:
        running.unlink(missing_ok=True)
        costs.unlink(missing_ok=True)
