"""The command line `repro`: execute chapters with papermill, sweep them, build the book, accept verdicts.

Everything that a command shows or writes comes out of executed notebooks; see `lib.records` for where they lie.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml

from lib import claims, records
from lib.cost import told
from lib.digest import digest
from lib.execute import RunError, alone, execute, stoppable
from lib.parameters import ParameterError, check
from lib.sweep import confirm, sweep


def last_time(name, size=""):
    """How long a chapter last took and where, in words."""
    pages = claims.project_root() / "book" / "records" / "pages.json"
    here = records.path("full" if size else "executed", name, ".json")
    if size and not here.exists():
        return f"no record on the paper's data yet: {'hours on a GPU' if size == 'full' else 'about an hour on two cores'}"
    record = records.read(here) if here.exists() else records.read(pages).get(name) if pages.exists() else None
    if record is None:
        return "not timed yet"
    return f"last took {record['seconds']:.0f} s on {record['machine']} ({record['date'][:10]})"


def report(name, notebook, tier, record, deviations=()):
    """Print what an executed notebook has settled; `record`: with the recorded sweep of the page's own parameters."""
    settled = records.settled_sources(name, claims.read_settled(notebook), tier, deviations, record=record)
    rows = [r for r in claims.scoreboard(settled) if r["notebook"]]
    for row in rows:
        print(f"  {row['paper']}/{row['id']}: {row['verdict']}{' (' + row['reason'] + ')' if row['reason'] else ''}")
    if glued := records.glued(notebook):
        print("numbers of the page: " + ", ".join(f"{key} = {value}" for key, value in glued.items()))


def run_notebook(name, given, size=""):
    """`repro run NOTEBOOK`: once, with other parameters or on the paper's data; only that unchanged is a record.

    `size`: "full" or "reduced", whose parameters stand in ``<topic>.<size>.yaml``; a record of full size is not overwritten
    by a reduced one.
    """
    parameters, deviations = records.parameters_of(name, size) if size else ({}, [])
    parameters = check(records.read(records.path("source", name)), parameters | given)
    tier = "full" if size else "fast"
    target = records.path("full" if size else "executed", name)
    if given:
        target = claims.project_root() / "_build" / "runs" / f"{name}-{digest([tier, parameters])[:8]}.ipynb"
        deviations = [*deviations, *(f"{key} = {value} (command line)" for key, value in given.items())]
    if size == "reduced" and not given and target.exists() and not records.read(target.with_suffix(".json"))["parameters"].get("small"):
        raise RunError(f"{target.relative_to(claims.project_root())} is a record of full size; move it away to make a reduced one")
    print(f"{name}: {last_time(name, size)}", flush=True)
    with alone(target):
        record = execute(name, parameters, target, tier, deviations)
    print(f"{name}: {record['seconds']:.0f} s ({told(record)}) -> {target.relative_to(claims.project_root())}")
    report(name, target, tier, not given, deviations)


def execute_all():
    """Execute every chapter whose executed copy is missing or out of date; all failures are told together."""
    failed = []
    for name in records.notebooks():
        if records.current(name):
            print(f"{name}: up to date ({last_time(name)})")
            continue
        try:
            run_notebook(name, {})
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
                and records.without_device(record["parameters"]) == records.seeds_parameters(name) \
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
    size = run.add_mutually_exclusive_group()
    size.add_argument("--full", dest="size", action="store_const", const="full", default="", help="the paper's data and settings (a GPU, hours)")
    size.add_argument("--reduced", dest="size", action="store_const", const="reduced", help="the paper's data at a size for two cores (an hour)")
    run.add_argument("--max-minutes", type=float, metavar="M", help="stop after M minutes; the same command goes on from there")
    run.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="sweep on the workers of this dask scheduler")
    run.add_argument("--gpus", type=int, default=0, metavar="N", help="sweep on N GPUs of this machine, a point on each")
    commands.add_parser("accept", help="take outputs, sweeps, times and verdicts of the newest runs into the tree")
    again = commands.add_parser("confirm", help="after a change of code that should not matter: do recorded sweeps return digit for digit?")
    again.add_argument("notebooks", nargs="+", metavar="NOTEBOOK")
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
    if options.size and axes:
        raise RunError(f"--{options.size} and --sweep cannot be combined yet: sweep a fast page, or run one {options.size} page")
    if (options.scheduler or options.gpus) and (not axes or options.scheduler and options.gpus):
        raise RunError("--sweep takes either --scheduler, whose workers bring their GPUs, or --gpus of this machine; "
                       "one run is one process, see -p device")
    for name in [_name_of(n) for n in options.notebooks]:
        sweep(name, given, axes, options.scheduler, options.gpus) if axes else run_notebook(name, given, options.size)


def main(argv=None):
    """The console command `repro`; mistakes end in one line and a non-zero exit."""
    options = _parser().parse_args(argv)
    try:
        with stoppable(getattr(options, "max_minutes", None)):
            {"book": book, "accept": accept, "data": data_sets, "smoke": smoke, "run": lambda: _run(options),
             "confirm": lambda: [confirm(_name_of(n)) for n in options.notebooks],
             "scoreboard": lambda: scoreboard(options.json)}[options.command]()
    except (RunError, ParameterError, claims.ClaimError) as error:
        print(f"repro: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("repro: interrupted; finished pages, points and checkpoints are kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
