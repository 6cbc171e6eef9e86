"""The command line `repro`: execute chapters with papermill, sweep them, build the book, accept verdicts.

Everything that a command shows or writes comes out of executed notebooks; see `lib.records` for where they lie.
"""
import argparse
import itertools
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import yaml

from lib import claims, records
from lib.digest import digest
from lib.parameters import ParameterError, check


class RunError(RuntimeError):
    """A run that failed, told in one line."""


# glibc keeps freed memory instead of mapping it anew at every pass: a forward pass without gradients is 2 to 3.5 times as fast
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


@contextmanager
def _environment(**variables):
    """What the kernel has to know: its chapter and its tier; dask, too, leaves variables behind that end here."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _largest_child():
    """Resident memory of the largest finished child process, MiB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024


def execute(name, parameters, target, tier="fast", deviations=(), progress=True):
    """Execute chapter `name` with papermill into `target` and write its manifest beside it.

    The target appears only when the run has succeeded; a failed one is kept under ``_build/failed``.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError
    aside = claims.project_root() / "_build" / "failed" / f"{name}-{os.getpid()}.ipynb"
    aside.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    start, largest, before = time.perf_counter(), _largest_child(), records.parts(name, parameters)
    given = {"REPRO_GIVEN": "1"} if parameters else {}
    with _environment(REPRO_NOTEBOOK=name, REPRO_TIER=tier, PYTHONHASHSEED="0", **KEPT_MEMORY, **given):
        try:
            papermill.execute_notebook(str(records.path("source", name)), str(aside), parameters=parameters,
                                       cwd=str(records.path("source", name).parent), progress_bar=progress,
                                       kernel_name="python3", language="python", autosave_cell_every=30,
                                       extra_arguments=["--log-level=40"])     # not its warning about plain TCP
        except KeyboardInterrupt:
            aside.unlink(missing_ok=True)
            raise
        except PapermillExecutionError as error:
            kept = aside.with_name(f"{Path(name).name}.ipynb")
            aside.replace(kept)
            raise RunError(f"{name}: {error.ename}: {str(error.evalue).splitlines()[0] if error.evalue else ''} "
                           f"(cell {error.exec_count}; see {kept.relative_to(claims.project_root())})") from None
    memory = _largest_child()
    # a kernel smaller than an earlier one of this process leaves no trace
    record = records.manifest(name, parameters, tier, time.perf_counter() - start,
                              memory if memory > largest else None, before, deviations)
    records.write(target, aside.read_text(encoding="utf-8"))
    records.write(target.with_suffix(".json"), record)
    aside.unlink()
    return record


def last_time(name, full=False):
    """How long a chapter last took and where, in words."""
    pages = claims.project_root() / "book" / "records" / "pages.json"
    here = records.path("full" if full else "executed", name, ".json")
    if full and not here.exists():
        return "no full-size run yet: hours on a GPU"
    record = records.read(here) if here.exists() else records.read(pages).get(name) if pages.exists() else None
    if record is None:
        return "not timed yet"
    return f"last took {record['seconds']:.0f} s on {record['machine']} ({record['date'][:10]})"


def report(name, notebook, tier, record):
    """Print what an executed notebook has settled; `record`: with the recorded sweep of the page's own parameters."""
    settled = records.settled_sources(name, claims.read_settled(notebook), tier, record=record)
    rows = [r for r in claims.scoreboard(settled) if r["notebook"]]
    for row in rows:
        print(f"  {row['paper']}/{row['id']}: {row['verdict']}{' (' + row['reason'] + ')' if row['reason'] else ''}")
    if glued := records.glued(notebook):
        print("numbers of the page: " + ", ".join(f"{key} = {value}" for key, value in glued.items()))


def run_notebook(name, given, full):
    """`repro run NOTEBOOK`: once, with other parameters or at full size; only the unchanged full size is a record."""
    parameters, deviations = records.full_parameters(name) if full else ({}, [])
    parameters = check(records.read(records.path("source", name)), parameters | given)
    tier = "full" if full else "fast"
    if given:
        target = claims.project_root() / "_build" / "runs" / f"{name}-{digest([tier, parameters])[:8]}.ipynb"
        deviations = [*deviations, *(f"{key} = {value} (command line)" for key, value in given.items())]
    else:
        target = records.path("full" if full else "executed", name)
    print(f"{name}: {last_time(name, full)}", flush=True)
    record = execute(name, parameters, target, tier, deviations)
    print(f"{name}: {record['seconds']:.0f} s -> {target.relative_to(claims.project_root())}")
    report(name, target, tier, record=not given)


def _point(name, parameters, target):
    """One point of a sweep, in a worker process; a finished one is skipped."""
    target = Path(target)
    record = target.with_suffix(".json")
    if target.exists() and record.exists() and not records.changed(records.read(record), name, but=records.SHOWN):
        return True
    execute(name, parameters, target, progress=False)
    return False


def _rows(parameters, swept, notebook):
    for key, result in claims.read_settled(notebook).items():
        for variable, value in result.get("values", {}).items():
            yield {**{s: parameters[s] for s in swept}, "claim": key, "name": variable, "value": float(value)}


def sweep(name, given, axes):
    """`repro run NOTEBOOK --sweep seed 0 1 2`: every point of the grid, on a local dask cluster.

    The tidy table (a row for each point, claim and name) lies under ``_build/sweeps``; `repro accept` moves a sweep
    over seeds of the unchanged fast tier into the records of the book. Such a sweep takes the parameters of the
    page's ``.seeds.yaml``, where there is one: what is too slow for the live page is run at length for the record.
    """
    import pandas as pd
    from distributed import Client, LocalCluster, as_completed
    from tqdm import tqdm
    logging.getLogger("distributed").setLevel(logging.ERROR)
    source = records.read(records.path("source", name))
    if set(axes) <= {"seed", "control"} and not given:
        given = records.seeds_parameters(name)
    grid = [check(source, given | dict(zip(axes, values))) for values in itertools.product(*axes.values())]
    folder = records.path("sweeps", name, "")
    targets = [folder / f"{digest(p)[:12]}.ipynb" for p in grid]
    workers = max(1, min(len(grid), os.cpu_count()))
    print(f"{name}: {len(grid)} points on {workers} workers; a page {last_time(name)}", flush=True)
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // workers))}
    failed = []
    with _environment(**threads), LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster, \
            Client(cluster) as client:
        futures = {client.submit(_point, name, p, str(t), pure=False): p for p, t in zip(grid, targets)}
        for future in tqdm(as_completed(list(futures)), total=len(futures), unit="point"):
            if future.exception() is not None:
                failed.append(f"{futures[future]}: {future.exception()}")
    if failed:
        raise RunError(f"{len(failed)} of {len(grid)} points failed, finished ones are kept; first: {failed[0]}")
    points = [records.read(t.with_suffix(".json")) for t in targets]
    if mixed := {records.changed(point, name, but=records.SHOWN) for point in points} - {""}:
        raise RunError(f"{', '.join(mixed)} changed during the sweep: repeat the command")
    table = pd.DataFrame([row for p, t in zip(grid, targets) for row in _rows(p, list(axes), t)])
    summary = records.manifest(name, given, "fast", sum(p["seconds"] for p in points), None, records.parts(name, given))
    summary |= {"sweep": {k: sorted({p[k] for p in grid}) for k in axes}, "points": len(grid)}
    target = folder / f"{'-'.join(sorted(axes))}.csv"
    records.write(target, table.to_csv(index=False, float_format="%.10g"))
    records.write(target.with_suffix(".json"), summary)
    print(f"{name}: {len(grid)} points -> {target.relative_to(claims.project_root())}")


def execute_all():
    """Execute every chapter whose executed copy is missing or out of date; all failures are told together."""
    failed = []
    for name in records.notebooks():
        if records.current(name):
            print(f"{name}: up to date ({last_time(name)})")
            continue
        try:
            run_notebook(name, {}, full=False)
        except RunError as error:
            records.path("executed", name).unlink(missing_ok=True)
            failed.append(str(error))
            print(f"FAILED {error}", file=sys.stderr)
    if failed:
        raise RunError(f"{len(failed)} of {len(records.notebooks())} notebooks failed: {'; '.join(failed)}")


def with_outputs(name):
    """The committed notebook with the outputs of its executed copy, and nothing else of papermill's."""
    source, done = records.read(records.path("source", name)), records.read(records.path("executed", name))
    outputs = [c for c in done["cells"] if c["cell_type"] == "code"
               and "injected-parameters" not in c["metadata"].get("tags", [])]
    for cell, run in zip([c for c in source["cells"] if c["cell_type"] == "code"], outputs, strict=True):
        cell["outputs"], cell["execution_count"] = run["outputs"], run["execution_count"]
    return source


def seed_cache():
    """Hand the executed chapters to the book's cache, so that building executes nothing again."""
    import nbformat
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn
    folder = claims.project_root() / "_build" / ".jupyter_cache"
    shutil.rmtree(folder, ignore_errors=True)
    cache = get_cache(folder)
    for name in records.notebooks():
        notebook = nbformat.from_dict(with_outputs(name))
        seconds = records.read(records.path("executed", name, ".json"))["seconds"]
        cache.cache_notebook_bundle(CacheBundleIn(notebook, str(records.path("source", name)),
                                                  data={"execution_seconds": seconds}), check_validity=False)


def book():
    """`repro book`: execute, judge, render; fails on any failed notebook, warning or flipped verdict."""
    from lib import pages
    execute_all()
    rows = claims.scoreboard(records.sources())
    pages.generate(rows)
    seed_cache()
    root = claims.project_root()
    shutil.rmtree(root / "_build" / ".doctrees", ignore_errors=True)   # an incremental build hides failed pages
    jupyter_book = "from jupyter_book.cli.main import main; main()"     # the package has no __main__
    done = subprocess.run([sys.executable, "-c", jupyter_book, "build", ".", "-W", "-n", "--keep-going", "-q"], cwd=root,
                          env=os.environ | {"PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise RunError("jupyter-book build failed: see the messages above")
    print(f"open {root / '_build' / 'html' / 'index.html'}")
    if lines := records.flips(rows):
        print(*lines[:50], sep="\n")
        raise RunError(f"verdicts that differ from book/verdicts.json: {len(lines)}; look, then `repro accept`")


def _accept_sweep(name):
    """Take the newest sweep over seeds of the unchanged page into the records; return whether there was one.

    It has to hold the seeds 0 to 4 (nobody picks seeds) and every axis of the record that it replaces.
    """
    there = records.path("seeds", name, ".json")
    axes = set(records.read(there)["sweep"]) if there.exists() else {"seed"}
    for summary in sorted(records.path("sweeps", name, "").glob("*seed.json"), key=lambda p: p.stat().st_mtime):
        record = records.read(summary)
        swept = record.get("sweep", {})
        if axes <= set(swept) <= {"seed", "control"} and set(range(claims.MIN_SEEDS)) <= set(swept["seed"]) \
                and record["parameters"] == records.seeds_parameters(name) \
                and not records.changed(record, name, but=records.SHOWN):
            before = records.path("seeds", name, ".csv").read_text() if there.exists() else ""
            for suffix in (".csv", ".json"):
                records.write(records.path("seeds", name, suffix), summary.with_suffix(suffix).read_text())
            return before != summary.with_suffix(".csv").read_text()
    return False


def accept():
    """`repro accept`: commit-ready outputs, sweeps, times and verdicts from the newest runs, and the diff of verdicts."""
    new = [name for name in records.notebooks() if _accept_sweep(name)]
    stale = [name for name in records.notebooks() if not records.current(name)]
    if stale:
        taken = f"took the new sweeps of {', '.join(new)}; " if new else ""
        raise RunError(f"{taken}not executed since the last change: {', '.join(stale)}; `repro book`, then accept again")
    times = {}
    for name in records.notebooks():
        records.write(records.path("source", name), json.dumps(with_outputs(name), indent=1, ensure_ascii=False) + "\n")
        times[name] = records.read(records.path("executed", name, ".json"))
    records.write(claims.project_root() / "book" / "records" / "pages.json", times)
    rows = claims.scoreboard(records.sources())
    print(*records.flips(rows) or ["no verdict changed"], sep="\n")
    records.write_verdicts(rows)
    print("wrote the outputs of the pages, book/records/pages.json and book/verdicts.json: see git diff")


def scoreboard(as_json):
    """`repro scoreboard`: counts in words, or every row as one JSON object."""
    rows = claims.scoreboard(records.sources())
    if as_json:
        print(json.dumps(claims.finite({"claims": rows, "counts": claims.counts(rows)}), ensure_ascii=False))
        return
    counted, why = claims.counts(rows), Counter(r["reason"] for r in rows if r["verdict"] == "not-run")
    lots = {"all": {"all": counted["all"]}, "papers": counted["papers"], "evidence": counted["evidence"]}
    print(f"{'':14}" + "".join(f"{slug:>22}" for slug in claims.VERDICTS))
    for lot in lots.values():
        print(*(f"{key:14}" + "".join(f"{count[slug]:>22}" for slug in claims.VERDICTS) for key, count in lot.items()), "", sep="\n")
    print(*(f"not-run, {reason}: {count}" for reason, count in why.most_common()), sep="\n")
    print(f"{counted['statistical']} verdicts are statistical; expect at most {counted['expected_false']} of them to be false by chance")


def data_sets():
    """`repro data`: the data sets, their sizes, and where they lie."""
    import pandas as pd

    from lib import data
    print(pd.DataFrame(data.catalogue()).to_string(index=False))
    print("images: (train, validation, test); size: (channels, height, width)\n"
          "folder:PATH: images of your own, PATH/train/<class>/ and PATH/test/<class>/, all of one size and mode")


def smoke():
    """Write every trained chapter with its tiny parameters to ``_build/smoke``, for nbval."""
    import papermill
    for name in records.notebooks():
        file = records.path("source", name, ".smoke.yaml")
        if file.exists():
            target = claims.project_root() / "_build" / "smoke" / f"{name}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            parameters = check(records.read(records.path("source", name)), yaml.safe_load(file.read_text()))
            papermill.execute_notebook(str(records.path("source", name)), str(target), parameters, prepare_only=True,
                                       progress_bar=False)


def _name_of(text):
    """``<paper>/<topic>`` of a notebook given by its path in this project or by its name."""
    path = Path(text).resolve()
    inside = path.suffix == ".ipynb" and path.is_relative_to(claims.project_root() / "notebooks")
    name = str(path.relative_to(claims.project_root() / "notebooks").with_suffix("")) if inside else text
    if name not in records.notebooks():
        raise RunError(f"notebook must be one of {', '.join(records.notebooks())}, got {text!r}")
    return name


def _parser():
    parser = argparse.ArgumentParser("repro", description="Execute the chapters, build the book, judge the claims.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("book", help="execute the notebooks and build _build/html/index.html")
    run = commands.add_parser("run", help="execute notebooks, with other parameters or over a grid")
    run.add_argument("notebooks", nargs="+", metavar="NOTEBOOK")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    run.add_argument("--sweep", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"), help="values of a parameter")
    run.add_argument("--full", action="store_true", help="the paper's data and settings (a GPU, hours)")
    commands.add_parser("accept", help="take outputs, sweeps, times and verdicts of the newest runs into the tree")
    board = commands.add_parser("scoreboard", help="the verdict of each claim")
    board.add_argument("--json", action="store_true", help="one JSON object: claims and counts")
    commands.add_parser("data", help="the data sets and where they lie")
    commands.add_parser("smoke", help="write the trained chapters with tiny parameters to _build/smoke")
    return parser


def _run(options):
    given = dict(options.p)
    axes = {name: values for name, *values in options.sweep}
    if empty := [name for name, values in axes.items() if not values]:
        raise RunError(f"--sweep {empty[0]} needs at least one value")
    once = [name for name, _ in options.p] + [name for name, *_ in options.sweep]
    if twice := [name for name in once if once.count(name) > 1]:
        raise RunError(f"parameter {twice[0]} is given twice")
    if twice := [f"{name} {v}" for name, values in axes.items() for v in values if values.count(v) > 1]:
        raise RunError(f"--sweep has the value {twice[0]} twice")
    if options.full and axes:
        raise RunError("--full and --sweep cannot be combined yet: sweep a fast page, or run one full page")
    for name in [_name_of(n) for n in options.notebooks]:
        sweep(name, given, axes) if axes else run_notebook(name, given, options.full)


def main(argv=None):
    """The console command `repro`; mistakes end in one line and a non-zero exit."""
    options = _parser().parse_args(argv)
    try:
        {"book": book, "accept": accept, "data": data_sets, "smoke": smoke, "run": lambda: _run(options),
         "scoreboard": lambda: scoreboard(options.json)}[options.command]()
    except (RunError, ParameterError, claims.ClaimError) as error:
        print(f"repro: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("repro: interrupted; finished pages, points and checkpoints are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
