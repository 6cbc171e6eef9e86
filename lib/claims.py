"""The ledger of claims, the rules fixed before the runs, and the verdicts that follow from executed code.

A claim lives in ``book/claims/<paper>.yaml``.
Its rule names the arrays that a notebook has to supply, an expression over them, and the values that are allowed.
A notebook hands the arrays to `settle`, which measures every expression with its interval and stores the result
in the cell's output; `verdict` turns stored results into one of the slugs below.
Nothing in between can be typed by hand.
"""
import hashlib
import html
import json
import math
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from lib.measure import LEVEL, ClaimError, evaluate, measure, names_in, outcome

MIME = "application/vnd.repro.claims+json"
KEPT = "beyond"        # what the column `claim` of a recorded sweep says of numbers that no claim asks for
VERDICTS = ("holds", "holds-as-corrected", "fails", "undecided", "holds-by-construction", "cited", "not-run")
EVIDENCE = ("theorem", "stand-in", "reduced", "paper-settings")
MIN_SEEDS = 5
RULE_KEYS = {"tier", "data", "by", "n", "when", "atoms", "printed", "may_hold_under", "scope", "note"}
ATOM_KEYS = {"q", "in", "like", "tol", "by", "says", "erratum"}


def project_root():
    """The folder that holds ``book/claims``, looked for upwards from the working folder, then beside `lib`."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent):
        if (folder / "book" / "claims").is_dir():
            return folder
    raise ClaimError("no book/claims found: run inside a clone of the project, the ledger is not in the wheel")


def papers():
    """The keys of the papers in the ledger, sorted."""
    return sorted(path.stem for path in (project_root() / "book" / "claims").glob("*.yaml"))


@lru_cache
def _load(path, mtime):
    return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def ledger(paper):
    """One paper's ledger as a dict with `settings` and `claims`; unknown papers raise."""
    path = project_root() / "book" / "claims" / f"{paper}.yaml"
    if not path.exists():
        raise ClaimError(f"paper must be one of {', '.join(papers())}, got {paper!r}")
    return _load(str(path), path.stat().st_mtime_ns)


def claim(paper, id):
    """One claim of the ledger; unknown ids raise."""
    for entry in ledger(paper)["claims"]:
        if entry["id"] == id:
            return entry
    raise ClaimError(f"claim must be an id of book/claims/{paper}.yaml, got {id!r}")


def rule_digest(entry):
    """Twelve hex digits that change when a claim's rule or the paper's value changes."""
    judged = {key: entry.get(key) for key in ("rule", "value")}
    return hashlib.sha256(json.dumps(judged, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _atoms(rule):
    return [*rule.get("when", []), *rule["atoms"], *rule.get("printed", [])]


def rule_names(rule):
    """Every array name that a rule needs."""
    fields = [f for a in _atoms(rule) for f in (a["q"], a.get("like", 0), *a.get("in", ()))]
    by = {rule["by"], *(a.get("by") for a in _atoms(rule))}
    return set().union(*(names_in(f) for f in fields)) | ({"block"} if "blocks" in by else set())


def check_rule(entry):
    """Raise one clear line where a claim's rule is malformed."""
    rule, where = entry["rule"], f"rule of {entry['id']}"
    if unknown := set(rule) - RULE_KEYS:
        raise ClaimError(f"{where}: unknown keys {sorted(unknown)}")
    if rule.get("tier") not in ("fast", "full"):
        raise ClaimError(f"{where}: tier must be fast or full, got {rule.get('tier')!r}")
    if not rule.get("atoms"):
        raise ClaimError(f"{where}: it has no atoms")
    for atom in _atoms(rule):
        if unknown := set(atom) - ATOM_KEYS:
            raise ClaimError(f"{where}: unknown keys {sorted(unknown)} in an atom")
        if atom.get("by", rule.get("by")) not in {"exact", "construction", *LEVEL}:
            raise ClaimError(f"{where}: by must be exact, construction, {', '.join(LEVEL)}")
        if ("in" in atom) == ("like" in atom):
            raise ClaimError(f"{where}: an atom needs either in or like: {atom['q']}")
        if "like" in atom and set(atom.get("tol", {})) not in ({"abs"}, {"rel"}):
            raise ClaimError(f"{where}: like needs tol with abs or rel: {atom['q']}")
    errata = len(entry.get("erratum", []))
    if any(not 1 <= a.get("erratum", 1) <= errata for a in rule.get("printed", [])):
        raise ClaimError(f"{where}: a printed atom names an erratum that the claim does not have")
    rule_names(rule)


def allowed(atom, entry, arrays):
    """The interval [lo, hi] that an atom allows; `like: value` stands for the paper's own number."""
    known = {k: np.asarray(v) for k, v in arrays.items()} | {"value": entry.get("value", math.nan)}
    if "in" in atom:
        return [float(evaluate(bound, known)) for bound in atom["in"]]
    target, tol = float(evaluate(atom["like"], known)), atom["tol"]
    margin = tol["abs"] if "abs" in tol else abs(target) * tol["rel"]
    return [target - margin, target + margin]


settled = []        # what this kernel has settled so far, for `lib.records.show_verdicts`


def _measure_part(part, rule, entry, arrays):
    """The atoms of one part of a rule measured; a condition (`when`) is exact unless it says otherwise."""
    rows = []
    for atom in rule.get(part, []):
        by = atom.get("by", "exact" if part == "when" else rule["by"])
        estimate, low, high, n = measure(atom["q"], arrays, by)
        bounds = allowed(atom, entry, arrays)
        rows.append({"q": str(atom["q"]), "says": atom.get("says", ""), "by": by, "n": n, "estimate": estimate,
                     "low": low, "high": high, "allowed": bounds, "outcome": outcome(low, high, bounds, by),
                     "erratum": atom.get("erratum", 1)})
    return rows


def measure_claim(entry, arrays):
    """Every atom of a claim's rule measured on `arrays`: the JSON that `settle` stores."""
    if "rule" not in entry:
        raise ClaimError(f"claim {entry['id']} has no rule: write it in the ledger, in a commit before the run")
    check_rule(entry)
    rule, needed = entry["rule"], rule_names(entry["rule"])
    if unknown := set(arrays) - needed:
        raise ClaimError(f"claim {entry['id']}: names {sorted(unknown)} are not in its rule")
    if missing := needed - set(arrays):
        raise ClaimError(f"claim {entry['id']}: its rule needs the names {sorted(missing)}")
    result = {part: _measure_part(part, rule, entry, arrays) for part in ("when", "atoms", "printed")}
    if rule["by"] == "seeds":
        result["values"] = {name: float(np.asarray(arrays[name])) for name in sorted(needed)}
    return result | {"rule": rule_digest(entry)}


def notebook_name():
    """``<paper>/<topic>`` of the running notebook, told by the runner, else by nbval's or Jupyter's working folder."""
    return os.environ.get("REPRO_NOTEBOOK") or f"{Path.cwd().name}/"


def settle(measured, section, paper=None):
    """Measure the rules of several claims on the arrays of one section and store the result in the cell's output.

    Args:
        measured: {claim id: {name: array}}; an id of another paper is written ``paper/id``.
        section: the section's title, shown with the claim.
        paper: the paper's key; by default the folder of the notebook.
    Raises:
        ClaimError: unknown claim, no rule, unknown or missing names.
    """
    from IPython.display import display
    stored = {}
    for key, arrays in measured.items():
        owner, _, id = key.rpartition("/")
        owner = owner or paper or notebook_name().split("/")[0]
        stored[f"{owner}/{id}"] = measure_claim(claim(owner, id), arrays) | {"section": section}
    settled.append(stored)
    document = json.loads(json.dumps(finite(stored)))
    display({MIME: {"tier": os.environ.get("REPRO_TIER", "fast"), "claims": document},
             "text/html": _table(stored), "text/plain": "\n".join(_plain(stored))}, raw=True)


def pick(pool, ids, data, paper=None):
    """{claim id: the arrays that its rule needs} out of one `pool` {name: array}.

    Claims about data sets that are not among `data`, those of this run, are left out.
    """
    paper = paper or notebook_name().split("/")[0]
    rules = {id: claim(paper, id).get("rule") for id in ids}
    if without := [id for id, rule in rules.items() if rule is None]:
        raise ClaimError(f"claim {without[0]} has no rule: write it in the ledger, in a commit before the run")
    return {id: {name: pool[name] for name in rule_names(rule) & set(pool)} for id, rule in rules.items()
            if set(rule.get("data", ())) <= set(data)}


def show_measured(stored):
    """Display measured claims as `settle` does, without storing anything."""
    from IPython.display import display
    display({"text/html": _table(stored), "text/plain": "\n".join(_plain(stored))}, raw=True)


def finite(tree):
    """JSON has no infinities: write them as strings; `float` reads them back."""
    if isinstance(tree, dict):
        return {k: finite(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [finite(v) for v in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _plain(stored):
    """Stable across machines: which atoms lie inside, no digits."""
    return [f"{key}: " + ", ".join(row["outcome"] for row in result["atoms"])
            + "".join(f"; printed form {row['outcome']}" for row in result["printed"])
            for key, result in stored.items()]


def number(x):
    """A number for a table: four significant digits, ∞ for infinities."""
    x = float(x)
    return ("−∞" if x < 0 else "∞") if math.isinf(x) else f"{x:.4g}".replace("-", "−")


def span(low, high):
    """An interval for a table."""
    return number(low) if float(low) == float(high) else f"{number(low)} … {number(high)}"


def _table(stored):
    rows = []
    for key, result in stored.items():
        name = f"<code>{html.escape(key.partition('/')[2])}</code>"
        for part in ("when", "atoms", "printed"):
            for row in result[part]:
                says = row["says"] or row["q"]
                if part == "printed" and not says.startswith("as printed"):
                    says = f"as printed: {says}"
                cells = (name, html.escape(says), number(row["estimate"]), span(row["low"], row["high"]),
                         span(*row["allowed"]), row["n"], row["outcome"])
                rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
                name = ""
    head = "".join(f"<th>{h}</th>" for h in ("claim", "what is tested", "measured", "interval", "allowed", "n", ""))
    return f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def verdict(entry, result):
    """(slug, reason, decisive row) from the measured atoms of one claim."""
    rule = entry["rule"]
    if result["rule"] != rule_digest(entry):
        return "not-run", "rule changed since the run", None
    for row in result["when"]:
        if row["outcome"] != "holds":
            return "undecided", f"condition not met: {row['says'] or row['q']}", row
    for row in result["atoms"]:
        if row["outcome"] == "fails":
            return "fails", row["says"] or row["q"], row
    for row in result["atoms"]:
        # a full-size run costs too much for five: there the rule says how many
        least = MIN_SEEDS if row["by"] == "seeds" and rule["tier"] == "fast" else 1
        if row["by"] in LEVEL and row["n"] < max(least, rule.get("n", 1)):
            few = "one seed" if (row["by"], row["n"]) == ("seeds", 1) else f"n = {row['n']}"
            return "undecided", few, row
        if row["outcome"] == "undecided":
            return "undecided", f"interval not inside: {row['says'] or row['q']}", row
    for row in result["printed"]:
        if row["outcome"] != "fails" or math.isnan(row["low"]):
            return "undecided", f"printed form does not fail: erratum {row['erratum']}", row
    first, scope = result["atoms"][0], rule.get("scope", "")
    if rule["by"] == "construction":
        return "holds-by-construction", scope, first
    return ("holds-as-corrected" if result["printed"] else "holds"), scope, first


def evidence(rule, deviations=()):
    """The level of the evidence: theorem without data, stand-in on fast-tier data, else the paper's data."""
    if "data" not in rule:
        return "theorem"
    if rule["tier"] == "fast":
        return "stand-in"
    return "reduced" if deviations else "paper-settings"


def measure_record(paper, entry, table):
    """As `measure_claim` for a recorded sweep: `table` has the columns claim, name, seed, value, a row per run."""
    mine = table["claim"] == f"{paper}/{entry['id']}"
    # what an amended rule asks for, beside its recorded names, may be among the numbers that the page kept
    more = rule_names(entry["rule"]) - set(table["name"][mine])
    rows = table[mine | (table["claim"] == KEPT) & table["name"].isin(more)]
    if rows.duplicated(["name", "seed"]).any():
        raise ClaimError(f"claim {entry['id']}: the recorded sweep has a seed twice")
    wide = rows.pivot(index="seed", columns="name", values="value").sort_index()
    if missing := rule_names(entry["rule"]) - set(wide.columns):
        raise ClaimError(f"claim {entry['id']}: the recorded sweep lacks the names {sorted(missing)}")
    rule, arrays = entry["rule"], {name: wide[name].to_numpy() for name in wide.columns}
    return {part: _measure_part(part, rule, entry, arrays) for part in ("when", "atoms", "printed")} \
        | {"rule": rule_digest(entry)}


def read_settled(notebook, tier=None):
    """{paper/claim: stored JSON} of an executed notebook (a dict or a path); a claim settled twice raises.

    With `tier`, only what was settled in that tier: a smoke run is no evidence.
    """
    if not isinstance(notebook, dict):
        notebook = json.loads(Path(notebook).read_text(encoding="utf-8"))
    found = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            stored = output.get("data", {}).get(MIME, {})
            if tier not in (None, stored.get("tier")):
                continue
            for key, result in stored.get("claims", {}).items():
                for row in [*result["when"], *result["atoms"], *result["printed"]]:
                    row |= {k: float(row[k]) for k in ("estimate", "low", "high")}
                    row["allowed"] = [float(bound) for bound in row["allowed"]]
                    row["outcome"] = outcome(row["low"], row["high"], row["allowed"], row["by"])
                if key in found:
                    raise ClaimError(f"claim {key} is settled twice on one page")
                found[key] = result
    return found


def judge(paper, entry, source=None):
    """One row of the scoreboard for one claim.

    `source` tells where its evidence comes from: {notebook, result, table, record, stale, deviations}; `table` is the
    recorded sweep of a `by: seeds` claim, `stale` says what has changed since the run or the record.
    """
    row = {"paper": paper, "id": entry["id"], "kind": entry["kind"], "verdict": "not-run", "reason": "no chapter yet",
           "evidence": None, "tier": None, "notebook": None, "n": None, "interval": None, "record": None}
    if "cited" in entry:
        return row | {"verdict": "cited", "reason": f"quoted from {entry['cited']}"}
    if "rule" not in entry:
        return row
    rule = entry["rule"]
    row["tier"] = rule["tier"]
    if source is None:
        return row | {"reason": "no record on the paper's data" if rule["tier"] == "full" else "its notebook has not run"}
    row |= {"notebook": source["notebook"], "evidence": evidence(rule, source.get("deviations", ()))}
    if source.get("stale"):
        return row | {"reason": f"stale: {source['stale']}"}
    result = source["result"]
    if rule["by"] == "seeds" and source.get("table") is not None:
        row["record"] = source["record"]
        result = measure_record(paper, entry, source["table"])
    slug, reason, decisive = verdict(entry, result)
    if decisive is not None:
        row |= {"n": decisive["n"], "interval": [decisive["low"], decisive["high"]]}
    if decisive and entry["kind"] == "number" and row["evidence"] in ("stand-in", "reduced"):
        slug, reason = "undecided", f"only the paper's settings settle a number; measured {number(decisive['estimate'])}"
    return row | {"verdict": slug, "reason": reason}


def scoreboard(sources):
    """A row for each claim of the ledger; `sources` maps ``paper/id`` to what `judge` needs."""
    return [judge(paper, entry, sources.get(f"{paper}/{entry['id']}"))
            for paper in papers() for entry in ledger(paper)["claims"]]


def counts(rows):
    """Verdicts counted over all, per paper and per evidence level, and a bound on the false ones to expect by chance."""
    def count(some):
        return {slug: sum(r["verdict"] == slug for r in some) for slug in VERDICTS}
    rules = {(p, e["id"]): e["rule"] for p in papers() for e in ledger(p)["claims"] if "rule" in e}
    statistical, false = 0, 0.0
    for row in rows:
        if row["verdict"] in ("holds", "holds-as-corrected", "fails"):
            rule = rules[row["paper"], row["id"]]
            misses = [1 - LEVEL[b] for b in (a.get("by", rule["by"]) for a in rule["atoms"]) if b in LEVEL]
            statistical += bool(misses)
            # a false `fails` needs one interval beyond its bounds, a false `holds` every one inside
            false += (sum(misses) / 2 if row["verdict"] == "fails" else max(misses)) if misses else 0
    return {"all": count(rows), "papers": {p: count([r for r in rows if r["paper"] == p]) for p in papers()},
            "evidence": {level: count([r for r in rows if r["evidence"] == level]) for level in EVIDENCE},
            "statistical": statistical, "expected_false": round(false, 2)}


def show(rows):
    """Display rows of a scoreboard as a small table."""
    from IPython.display import display
    body = "".join(f"<tr><td><code>{html.escape(r['id'])}</code></td>"
                   f"<td>{html.escape(claim(r['paper'], r['id'])['says'])}</td>"
                   f'<td><span class="verdict {r["verdict"]}">{r["verdict"]}</span></td>'
                   f"<td>{r['evidence']}</td><td>{html.escape(r['reason'])}</td></tr>" for r in rows)
    head = "".join(f"<th>{h}</th>" for h in ("claim", "what it says", "verdict", "evidence", "why"))
    display({"text/html": f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
             "text/plain": "\n".join(f"{r['paper']}/{r['id']}: {r['verdict']}" for r in rows)}, raw=True)
