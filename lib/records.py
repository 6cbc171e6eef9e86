"""Where evidence lies: executed notebooks, recorded sweeps and runs on the papers' data, each with a manifest.

A manifest holds what a result depends on, part by part, so that a stale record can say what changed:
the code cells (those that only draw excepted), the parameters, the rules, and every module of `lib` behind them.
"""
import datetime
import html
import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import yaml

from lib import claims, measure
from lib.cost import told
from lib.digest import digest, module_digests, modules_of, syntax
from lib.parameters import parameters

KEPT_MIME = "application/vnd.repro.kept+json"
VERSIONS = ("torch", "numpy", "scipy", "scikit-learn", "scikit-image")


def notebooks():
    """``<paper>/<topic>`` of every chapter, and ``<topic>`` of one of no paper, in the order of the table of contents."""
    root = claims.project_root()
    listed = re.findall(r"notebooks/([\w/]+)", (root / "_toc.yml").read_text()) if (root / "_toc.yml").exists() else []
    pages = [p for pattern in ("*/*.ipynb", "*.ipynb") for p in (root / "notebooks").glob(pattern)]
    there = {str(p.relative_to(root / "notebooks").with_suffix("")) for p in pages}
    return [n for n in listed if n in there] + sorted(there - set(listed))


def path(kind, name, suffix=".ipynb"):
    """The file of one notebook: kind is source, executed, sweeps, seeds or full."""
    folder = {"source": "notebooks", "executed": "_build/executed", "sweeps": "_build/sweeps",
              "seeds": "book/records/seeds", "full": "book/records/full"}[kind]
    return claims.project_root() / folder / f"{name}{suffix}"


def read(file):
    """A JSON file (a notebook, a manifest) as a dict."""
    return json.loads(Path(file).read_text(encoding="utf-8"))


def write(file, content):
    """Write text, or a dict as JSON, so that a reader never meets half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def _code(notebook):
    """The code of a notebook in three lots: the parameters cell, the cells that only draw, and the rest."""
    lots = {"parameters": [], "figure": [], "rest": []}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            tags = set(cell["metadata"].get("tags", [])) & {"parameters", "figure"}
            lots[tags.pop() if tags else "rest"].append("".join(cell["source"]))
    return lots


def _values(name, given):
    """Every text among the parameters of a notebook, those in lists too."""
    declared = {k: p.parse(p.default.strip("\"'")) for k, p in parameters(read(path("source", name))).items()}
    values = [v for value in (declared | given).values() for v in (value if isinstance(value, list) else [value])]
    return [v for v in values if isinstance(v, str)]


def _file(own):
    """Text of the file behind a parameter such as ``my_model.py:build``: a reader's edit makes a run stale."""
    from lib.own import locate
    return locate(own)[0].read_text(encoding="utf-8")


def parts(name, given):
    """What the results of a notebook depend on: {part: digest}, with the parameters `given` over its defaults."""
    code = _code(read(path("source", name)))
    source = "\n".join(code["rest"])
    rules = {e["id"]: claims.rule_digest(e) for paper in claims.papers() for e in claims.ledger(paper)["claims"]
             if "rule" in e and f'"{"" if paper == name.split("/")[0] else paper + "/"}{e["id"]}"' in source}
    shown = path("full", name, ".json")
    own = [_file(v) for v in _values(name, given) if re.fullmatch(r".+\.py:\w+", v)]
    return {"code cells": syntax(source), "parameters": digest([*map(syntax, code["parameters"]), given]),
            "rules": digest(rules), **module_digests(modules_of(source)), "figures": digest(code["figure"]),
            "measuring": digest([syntax(Path(m.__file__).read_text(encoding="utf-8")) for m in (claims, measure)]),
            "recorded sweep": digest(path("seeds", name, ".csv").read_text()) if path("seeds", name, ".csv").exists() else "",
            **({"full-size record": digest(shown.read_text(encoding="utf-8"))} if shown.exists() else {}),
            **({"model file": digest(own)} if own else {})}


# What a page shows beside its numbers; the numbers of a recorded sweep do not depend on it.
SHOWN = {"figures", "measuring", "recorded sweep", "full-size record"}


def changed(manifest, name, but=frozenset()):
    """What has changed since a manifest was written, in words, parts in `but` aside; empty where it is current."""
    now, then = parts(name, manifest["parameters"]), manifest["parts"]
    return ", ".join(sorted(k for k in (now.keys() | then.keys()) - but if now.get(k) != then.get(k)))


def machine():
    """A short name of the machine: processor, cores, accelerator."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines()
                      if line.startswith("model name")), model)
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def commit():
    """The commit of the working tree, with + where tracked files differ from it; empty outside git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=claims.project_root(), capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def fingerprints(name, given):
    """{data set: fingerprint} of the data sets that a notebook's parameters name."""
    from lib import data
    known = {row["name"] for row in data.catalogue()}
    return {v: data.load(v).fingerprint for v in _values(name, given) if v in known}


def costs(manifests):
    """The cost of several runs as that of one: seconds of CPU summed, the largest memory, the GPUs' names."""
    known = {key: [m[key] for m in manifests if m.get(key) is not None]
             for key in ("cpu_seconds", "peak_memory_mib", "gpu_memory_mib", "gpu")}
    merge = {"cpu_seconds": sum, "gpu": lambda names: ", ".join(sorted(set(names)))}
    return {key: merge.get(key, max)(found) for key, found in known.items() if found}


def manifest(name, given, tier, seconds, spent, before, deviations=()):
    """The record beside an executed notebook, run with the parameters `given`; `before` is `parts` at its start.

    `spent`: what the kernel told of itself (`lib.cost.used`), empty where it could not.
    """
    return {"notebook": name, "tier": tier, "parameters": given, "seconds": round(seconds, 1), "peak_memory_mib": None,
            **spent, "machine": machine(), "device": given.get("device", "cpu"),
            "commit": commit(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(), "versions": {p: version(p) for p in VERSIONS},
            "data": fingerprints(name, given), "deviations": list(deviations), "parts": before}


def current(name):
    """Whether the executed notebook of the fast tier is there and nothing that matters has changed since."""
    record = path("executed", name, ".json")
    if not (record.exists() and path("executed", name).exists()):
        return False
    record = read(record)
    return not changed(record, name) and record["versions"] == {p: version(p) for p in VERSIONS}


def seeds_table(name):
    """(table, why stale) of the recorded sweep over seeds without a control; (None, "") where there is none."""
    import pandas as pd
    file = path("seeds", name, ".csv")
    if not file.exists():
        return None, ""
    table = pd.read_csv(file, dtype={"claim": str, "name": str})
    table = table[table["control"] == "none"] if "control" in table else table
    manifest = read(path("seeds", name, ".json"))
    other = "" if without_device(manifest["parameters"]) == seeds_parameters(name) else "parameters of the recorded sweep"
    return table, changed(manifest, name, but=SHOWN) or other


def full_record(name):
    """(settled, manifest, why stale) of the recorded run on the paper's data; ({}, None, "") where there is none."""
    if not path("full", name, ".json").exists():
        return {}, None, ""
    manifest = read(path("full", name, ".json"))
    # deviations found since stand in the .yaml of the same parameters; they add to those of the run, and take none away
    listed = [parameters_of(name, size) for size in ("full", "reduced") if path("source", name, f".{size}.yaml").exists()]
    manifest["deviations"] += [d for given, found in listed if given == manifest["parameters"] for d in found if d not in manifest["deviations"]]
    manifest["evidence"] = claims.evidence({"tier": "full", "data": ()}, manifest["deviations"])
    return claims.read_settled(path("full", name), "full"), manifest, changed(manifest, name, but=SHOWN - {"measuring"})


def on_papers_data(name):
    """{claim: number} of what the recorded run on the paper's data found, for claims of the page's own paper."""
    pairs = [(key.split("/"), found["atoms"][0]["estimate"]) for key, found in full_record(name)[0].items()]
    return {id: estimate for (paper, id), estimate in pairs if paper == name.split("/")[0]}


def show_recorded(name, cell):
    """Display what a cell, told by its id, drew in the recorded run on the paper's data; nothing where there is none."""
    from IPython.display import display
    cells = read(path("full", name))["cells"] if full_record(name)[1] else []
    for data in [output["data"] for c in cells if c["id"] == cell for output in c["outputs"]]:
        display({kind: "".join(content) for kind, content in data.items()}, raw=True)


def behind(name):
    """What the records of a notebook are, a line of HTML each: evidence, cost, date, what has changed; the rest unfolds."""
    sweeps, (_, full, old) = path("seeds", name, ".json"), full_record(name)
    found = [(f"Recorded sweep, {s['points']} runs", s, seeds_table(name)[1]) for s in map(read, [sweeps] * sweeps.exists())]
    found += [(f"Recorded run on the paper's data, {full['evidence']}", full, old)] if full else []
    return [_folded(f"{head}: {html.escape(told(m))}, {m['date'][:10]}." + f" <strong>Stale, changed since: {html.escape(stale)}.</strong>" * bool(stale),
                    [f"Commit {m['commit'] or 'none'}.",
                     *[f"Confirmed after a change of {c['changed']}: {c['points']} runs gave the same numbers{', seconds aside' * ('timed' in c)}, commit {c['commit']}."
                       for c in m.get("confirmed", [])[-1:]],
                     *[f"Deviations from the paper's settings: {'; '.join(m['deviations'])}."] * bool(m["deviations"])])
            for head, m, stale in found]


def _folded(summary, more):
    """HTML of one line that unfolds into more lines, plain text."""
    return f"<details class=\"record\"><summary>{summary}</summary>{'<br>'.join(html.escape(line, quote=False) for line in more)}</details>"


def keep(numbers):
    """Store {name: number} in the cell's output, for a recorded sweep: what a page measures that no paper claims."""
    from IPython.display import display
    display({KEPT_MIME: claims.finite({key: float(value) for key, value in numbers.items()}),
             "text/plain": f"{len(numbers)} numbers kept"}, raw=True)


def kept(notebook):
    """{name: number} of all that an executed notebook (a dict or a path) has kept."""
    cells = (notebook if isinstance(notebook, dict) else read(notebook))["cells"]
    return {key: float(value) for cell in cells for output in cell.get("outputs", [])
            for key, value in output.get("data", {}).get(KEPT_MIME, {}).items()}


def recorded(name):
    """{name: (mean, low, high, runs)} of a page's recorded sweep without control, 95 % t-intervals; empty where none is."""
    table, _ = seeds_table(name)
    if table is None:
        return {}
    once = table.drop_duplicates(["name", "seed"]).groupby("name")["value"]
    return {key: measure.measure("v", {"v": values.to_numpy()}, "seeds") for key, values in once}


def compare(measured, ids, scale=1):
    """A table paper | record | paper's data | here: `ids` maps this page's numbers to the claims with the paper's values.

    The record is the mean over the recorded runs with its 95 % t-interval; a name without a claim has no paper value.
    The third, where such a run is recorded, is what was settled for the claim there; its head tells the level of evidence.
    Below stands what the records are. `scale` times a number of the page is in the paper's unit: 100 for shares beside
    its percentages.
    """
    import pandas as pd
    name = claims.notebook_name()
    table, stale = seeds_table(name)
    (_, full, old), found = full_record(name), on_papers_data(name)
    rows = []
    for key, id in ids.items():
        record = "none yet"
        if table is not None and key in set(table["name"]):
            values = scale * table[table["name"] == key].drop_duplicates("seed")["value"].to_numpy()
            mean, low, high, n = claims.measure("v", {"v": values}, "seeds")
            record = f"{mean:.2f} ± {(high - low) / 2:.2f} (n = {n}{', stale' if stale else ''})"
        value = claims.claim(name.split("/")[0], id).get("value") if id else None
        row = {"": key, "paper": "" if value is None else f"{value}", "record": record}
        if full:
            row[f"paper's data, {full['evidence']}{', stale' if old else ''}"] = f"{found[id]:.2f}" if id in found else ""
        rows.append(row | {"here": f"{scale * measured[key]:.2f}"})
    return pd.DataFrame(rows).style.hide(axis="index").set_caption("".join(behind(name)))


def settled_sources(name, settled, tier="fast", deviations=(), stale="", record=True):
    """{paper/claim: source for `claims.judge`} of what one notebook has settled in one tier.

    `stale` says what has changed since it ran; without `record` the recorded sweep is left aside, as for a run with
    other parameters.
    """
    table, old = seeds_table(name) if tier == "fast" and record else (None, "")
    found = {}
    for key, result in settled.items():
        paper, _, id = key.partition("/")
        rule = claims.claim(paper, id).get("rule", {})
        if rule.get("tier") == tier:
            recorded = table is not None and rule["by"] == "seeds" and key in set(table["claim"])
            found[key] = {"notebook": name, "result": result, "table": table if recorded else None,
                          "stale": stale or (old if recorded else ""), "record": f"book/records/seeds/{name}.csv",
                          "deviations": deviations}
    return found


def sources():
    """What `claims.scoreboard` needs, from the newest executed notebooks, the committed outputs where none is.

    Committed outputs count only while what made them, told by ``book/records/pages.json``, is unchanged.
    """
    found, pages = {}, claims.project_root() / "book" / "records" / "pages.json"
    committed = read(pages) if pages.exists() else {}
    for name in notebooks():
        if current(name):
            new = settled_sources(name, claims.read_settled(path("executed", name), "fast"))
        else:
            stale = changed(committed[name], name) if name in committed else "never accepted"
            new = settled_sources(name, claims.read_settled(path("source", name), "fast"), stale=stale)
        settled, record, stale = full_record(name)
        if record:
            new |= settled_sources(name, settled, "full", record["deviations"], stale)
        if twice := set(found) & set(new):
            raise claims.ClaimError(f"claim {min(twice)} is settled by two pages")
        found |= new
    return found


def accepted():
    """The accepted verdicts {paper: {claim: [verdict, evidence, reason]}} of ``book/verdicts.json``."""
    file = claims.project_root() / "book" / "verdicts.json"
    return read(file) if file.exists() else {}


def verdicts(rows):
    """The rows of a scoreboard in the form of ``book/verdicts.json``."""
    return {paper: {r["id"]: [r["verdict"], r["evidence"], r["reason"]] for r in rows if r["paper"] == paper}
            for paper in claims.papers()}


def flips(rows):
    """A line for each verdict that differs from the accepted one."""
    before, now = accepted(), verdicts(rows)
    pairs = [(f"{p}/{i}", before.get(p, {}).get(i), now.get(p, {}).get(i))
             for p, i in sorted({(p, i) for tree in (before, now) for p in tree for i in tree[p]})]
    return [f"{key}: {' | '.join(map(str, old or ['not there']))} -> {' | '.join(map(str, new or ['not there']))}"
            for key, old, new in pairs if old != new]


def write_verdicts(rows):
    """Rewrite ``book/verdicts.json``, a line for each claim, so that a diff reads well."""
    blocks = [json.dumps(paper) + ": {\n" + ",\n".join(
        f" {json.dumps(id)}: {json.dumps(entry, ensure_ascii=False)}" for id, entry in rows_.items()) + "\n}"
        for paper, rows_ in verdicts(rows).items()]
    write(claims.project_root() / "book" / "verdicts.json", "{\n" + ",\n".join(blocks) + "\n}\n")


def glued(notebook):
    """{name: text} of the numbers that a page hands to its prose, from its executed notebook."""
    outputs = [o for c in read(notebook)["cells"] for o in c.get("outputs", [])]
    found = {o.get("metadata", {}).get("scrapbook", {}).get("name"): o["data"] for o in outputs if "data" in o}
    return {name: data["application/papermill.record/text/plain"] for name, data in found.items()
            if name and "application/papermill.record/text/plain" in data}


def show_record():
    """What the page's records are, and the rules that its recorded sweep judges, with intervals over training runs."""
    from IPython.display import HTML, display
    name = claims.notebook_name()
    paper, (table, stale) = name.split("/")[0], seeds_table(name)
    if table is not None and "rules" not in stale.split(", "):      # another rule may need numbers that were not recorded
        claims.show_measured({key: claims.measure_record(paper, claims.claim(paper, key.split("/")[1]), table)
                              for key in dict.fromkeys(table["claim"]) if key != claims.KEPT})
    for line in behind(name):
        display(HTML(line))


def show_verdicts():
    """The verdicts of all that this kernel has settled, for the end of a page."""
    name = claims.notebook_name()
    settled = {key: result for stored in claims.settled for key, result in stored.items()}
    if name.endswith("/") and settled:      # nbval and Jupyter do not tell the topic: find the page that settles these claims
        name = next((n for n in notebooks() if n.startswith(name) and
                     any(f'"{next(iter(settled)).partition("/")[2]}"' in "".join(c["source"])
                         for c in read(path("source", n))["cells"])), name)
    here = settled_sources(name, settled, record="REPRO_GIVEN" not in os.environ)
    claims.show([r for r in claims.scoreboard(here) if r["notebook"]])


def parameters_of(name, size):
    """(parameters, deviations) of the run on the paper's data in ``<topic>.<size>.yaml``; `size`: full or reduced."""
    file = path("source", name, f".{size}.yaml")
    if not file.exists():
        raise claims.ClaimError(f"--{size} needs {file.relative_to(claims.project_root())}, which does not exist")
    content = yaml.safe_load(file.read_text())
    return content.get("parameters", {}), content.get("deviations", [])


def without_device(given):
    """Parameters but the device: a record says where it ran, and may have run anywhere."""
    return {key: value for key, value in given.items() if key != "device"}


def seeds_parameters(name):
    """Parameters of the recorded sweep that differ from the page's, from ``<topic>.seeds.yaml``; usually none."""
    file = path("source", name, ".seeds.yaml")
    return yaml.safe_load(file.read_text()) if file.exists() else {}
