"""Run a chapter over a grid of parameters with dask: on this machine's cores or GPUs, or on a cluster that is there."""
import gc
import itertools
import logging
import math
import os
from contextlib import contextmanager

from lib import claims, records
from lib.digest import digest
from lib.execute import RunError, alone, environment, execute
from lib.parameters import check


def _target(name, parameters):
    return records.path("sweeps", name, "") / f"{digest(parameters)[:12]}.ipynb"


def _finished(name, target):
    record = target.with_suffix(".json")
    return target.exists() and record.exists() and not records.changed(records.read(record), name, but=records.SHOWN)


def _point(name, parameters, gpus=()):
    """One point of a sweep, in a worker process, unless it is finished: {file: text} of its notebook and manifest.

    A point that is asked for again, because its worker was taken for lost, waits until the first attempt is gone.
    """
    from distributed import get_worker
    worker, target = get_worker(), _target(name, parameters)
    if worker.state.nthreads != 1:
        raise RunError(f"a worker needs exactly one thread (dask worker --nthreads 1), got {worker.state.nthreads}")
    with alone(target, wait=True), environment(**{"CUDA_VISIBLE_DEVICES": gpus[int(worker.name) % len(gpus)]} if gpus else {}):
        if not _finished(name, target):
            execute(name, parameters, target, progress=False)
        return {file: file.read_text(encoding="utf-8") for file in (target, target.with_suffix(".json"))}


def _visible(gpus):
    """The GPUs to use, as CUDA numbers them: the first `gpus` of those that this process may see."""
    import torch
    count = torch.cuda.device_count()
    if not 1 <= gpus <= count:
        raise RunError(f"--gpus must be between 1 and {count}, the GPUs seen here, got {gpus}")
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:gpus]


@contextmanager
def _cluster(scheduler, workers):
    """A client of the scheduler at an address, or of a cluster of `workers` processes on this machine."""
    from distributed import Client, LocalCluster
    logging.getLogger("distributed").setLevel(logging.ERROR)
    gc.collect()        # a client that once failed to start, collected while the next one does, would wait for ever for its lock
    if scheduler:
        try:
            client = Client(scheduler, timeout=10)
        except (OSError, ValueError) as error:
            raise RunError(f"--scheduler must be the address of a running dask scheduler, got {scheduler!r} ({error})") from None
        with client:
            print(f"{len(client.scheduler_info(n_workers=-1)['workers'])} workers at {scheduler}", flush=True)
            yield client
        return
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // workers))}
    with environment(**threads), LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster, \
            Client(cluster) as client:
        yield client


def _run(name, todo, scheduler, gpus):
    """Run the points {target: parameters}; what failed, a line each."""
    if not todo:
        return []
    from distributed import as_completed
    from tqdm import tqdm
    failed = []
    with _cluster(scheduler, max(1, min(len(todo), len(gpus) or os.cpu_count()))) as client:
        futures = {client.submit(_point, name, p, gpus, pure=False): t for t, p in todo.items()}
        for future in tqdm(as_completed(list(futures)), total=len(futures), unit="point"):
            target = futures[future]
            if future.exception() is not None:
                failed.append(f"{todo[target]}: {future.exception()}")
            elif not _finished(name, target):       # the worker does not share this folder
                for file, text in future.result().items():
                    records.write(target.with_suffix(file.suffix), text)
    return failed


def _rows(parameters, swept, notebook):
    """What one point measured: the numbers of a training run, and in a sweep that is no record every settled quantity."""
    for key, result in claims.read_settled(notebook).items():
        values = result.get("values", {})
        if not set(swept) <= {"seed", "control"}:
            values = values or {atom["q"]: atom["estimate"] for atom in result["atoms"]}
        for variable, value in values.items():
            yield {**{s: parameters[s] for s in swept}, "claim": key, "name": variable, "value": float(value)}
    for variable, value in records.kept(notebook).items():
        yield {**{s: parameters[s] for s in swept}, "claim": claims.KEPT, "name": variable, "value": value}


def _figure(table, axes, target):
    """Every quantity over the first axis that is no seed, a colour for each value of the next, with 95 % intervals."""
    import seaborn as sns
    x, hue, *_ = [*sorted(axes, key=lambda name: name == "seed"), None]
    grid = sns.relplot(table.drop_duplicates([*axes, "name"]), x=x, y="value", hue=hue if hue != "seed" else None,
                       kind="line", marker="o", height=2.4, col="name", col_wrap=min(4, table["name"].nunique()),
                       facet_kws={"sharey": False})
    grid.set_titles("{col_name}").set_ylabels("").savefig(target)


def sweep(name, given, axes, scheduler=None, gpus=0):
    """`repro run NOTEBOOK --sweep seed 0 1 2`: every point of the grid; finished ones are skipped.

    `scheduler`: address of a dask scheduler, by default a cluster of this machine's cores, or with `gpus` of as many
    workers with a GPU each. The tidy table (a row for each point, claim and name) and its figure lie under
    ``_build/sweeps``; `repro accept` moves a sweep over seeds of the unchanged fast tier into the records of the book.
    Such a sweep takes the parameters of the page's ``.seeds.yaml``, where there is one: what is too slow for the live
    page is run at length for the record. Raises RunError where points failed; the others are kept.
    """
    import pandas as pd
    source = records.read(records.path("source", name))
    if set(axes) <= {"seed", "control"} and not given:
        given = records.seeds_parameters(name)
    devices, given = (_visible(gpus), {"device": "cuda"} | given) if gpus else ((), given)
    grid = (check(source, given | dict(zip(axes, values))) for values in itertools.product(*axes.values()))
    points = {_target(name, p): p for p in grid}
    todo = {t: p for t, p in points.items() if not _finished(name, t)}
    print(f"{name}: {len(points)} points, {len(points) - len(todo)} finished", flush=True)
    if failed := _run(name, todo, scheduler, devices):
        raise RunError(f"{len(failed)} of {len(points)} points failed, finished ones are kept; first: {failed[0]}")
    done = [records.read(t.with_suffix(".json")) for t in points]
    if mixed := {records.changed(point, name, but=records.SHOWN) for point in done} - {""}:
        raise RunError(f"{', '.join(mixed)} changed during the sweep: repeat the command")
    table = pd.DataFrame([row for t, p in points.items() for row in _rows(p, list(axes), t)])
    seconds, parts = sum(p["seconds"] for p in done), records.parts(name, given)
    summary = records.manifest(name, given, "fast", seconds, records.costs(done), parts)
    summary |= {"sweep": {k: sorted({p[k] for p in points.values()}) for k in axes}, "points": len(points)}
    target = records.path("sweeps", name, "") / f"{'-'.join(sorted(axes))}.csv"
    records.write(target, table.to_csv(index=False, float_format="%.10g"))
    records.write(target.with_suffix(".json"), summary)
    if len(table):
        _figure(table, list(axes), target.with_suffix(".png"))
    print(f"{name}: {len(points)} points -> {target.relative_to(claims.project_root())}, and a figure beside it")


def confirm(name):
    """`repro confirm NOTEBOOK`: after a change of code, keep a recorded sweep if its first points give the same numbers again.

    For a change that should not matter, such as a new parameter: the first seed of every other axis (two seeds where there
    is none) is run anew, and where every digit of the record returns, the record stands, with a note of what it survived.
    Seconds never return, and are asked only to be numbers: those that a claim of the ledger names under ``wall_clock``.
    Raises RunError, in one line, where it does not, or where the page now asks for a record with other parameters.
    """
    import pandas as pd
    file = records.path("seeds", name, ".json")
    if not file.exists():
        raise RunError(f"{name} has no recorded sweep to confirm")
    record, table = records.read(file), pd.read_csv(file.with_suffix(".csv"), dtype={"claim": str, "name": str})
    given, axes, stale = record["parameters"], record["sweep"], records.changed(record, name, but=records.SHOWN)
    if not stale:
        raise RunError(f"{name}: nothing has changed since the recorded sweep")
    if records.without_device(given) != records.seeds_parameters(name):
        raise RunError(f"{name}: its .seeds.yaml has changed, repeat the recorded sweep")
    few = axes | {"seed": axes["seed"][:2 if len(axes) == 1 else 1]}
    points = [dict(zip(few, values)) for values in itertools.product(*few.values())]
    todo = {_target(name, p): p for p in (check(records.read(records.path("source", name)), given | point) for point in points)}
    if failed := _run(name, {t: p for t, p in todo.items() if not _finished(name, t)}, None, ()):
        raise RunError(f"{name}: {failed[0]}")
    keys = [*axes, "claim", "name"]
    again = pd.DataFrame([row for t, p in todo.items() for row in _rows(p, list(axes), t)]).set_index(keys)["value"]
    before = table.set_index(keys)["value"].reindex(again.index)
    # a number that a claim asks for since may be among those that the page kept
    kept = table[table["claim"] == claims.KEPT].set_index([*axes, "name"])["value"].reindex(again.index.droplevel("claim"))
    before = before.fillna(pd.Series(kept.to_numpy(), again.index))
    seconds = {key: claims.claim(*key.split("/")).get("wall_clock", ()) for key in {*again.index.get_level_values("claim")} - {claims.KEPT}}
    timed = [variable in seconds.get(key, ()) for *_, key, variable in again.index]
    differ = [key for key, new, old, clock in zip(again.index, again, before, timed)
              if not (math.isfinite(new) and math.isfinite(old) if clock else f"{new:.10g}" == f"{old:.10g}")]
    if differ:
        raise RunError(f"{name}: {len(differ)} of {len(again)} numbers differ from the record, first {differ[0]}; repeat the sweep")
    survived = {"changed": stale, "points": len(points), "commit": records.commit(), **({"timed": sum(timed)} if any(timed) else {})}
    records.write(file, record | {"parts": records.parts(name, given), "confirmed": [*record.get("confirmed", []), survived]})
    clock = f" ({sum(timed)} of them seconds, which are not compared)" if any(timed) else ""
    print(f"{name}: {len(again)} numbers of {len(points)} points as recorded{clock}, in spite of changes of {stale}")
