"""The parts of the book that come out of code: scoreboard, failures, errata, status, parameters, counts.

`generate` writes them to ``_build/generated``, where the pages of ``book/`` include them.
Every function before it turns rows of `claims.scoreboard` and settled results into Markdown or HTML.
"""
import html
import json
import math
import platform
import re
from importlib.metadata import version

from lib import claims, records
from lib.parameters import parameters

# a verdict differs from another by word and sign, not by colour alone
SIGNS = {"holds": "✓", "holds-as-corrected": "✎", "fails": "✗", "undecided": "?",
         "holds-by-construction": "≡", "cited": "”", "not-run": "○"}
KINDS = ("theorem", "trend", "number", "figure")
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "scikit-image", "papermill", "jupyter-book", "sphinx")


def md(text):
    """Plain text of the ledger as Markdown: every sign that could start markup is escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#$|~^&!:+@=-])", r"\\\1", " ".join(str(text).split()))


def papers():
    """The keys of the papers in reading order: by year, then by name."""
    return sorted(claims.papers(), key=lambda paper: (claims.ledger(paper)["year"], paper))


def badge(slug):
    """A verdict as HTML: sign, word and colour."""
    return f'<span class="verdict {slug}">{SIGNS[slug]}&nbsp;{slug}</span>'


def anchor(*parts):
    """A stable HTML id, such as ``erratum-pope2020-thm3-1-optimal-l2-attack-2``."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower())


def headings(notebook):
    """The section titles of a notebook (a dict as read from its JSON)."""
    text = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    return set(re.findall(r"^#+ +(.+?) *$", text, re.M))


def link(row, sources):
    """HTML link to the page, and where its heading is found to the section, that settled a claim."""
    if not row["notebook"]:
        return ""
    target, text = f"../notebooks/{row['notebook']}.html", html.escape(row["notebook"])
    source = sources.get(f"{row['paper']}/{row['id']}", {})
    section = source.get("result", {}).get("section", "")
    if section and section in source.get("headings", ()):
        from docutils.nodes import make_id
        target, text = f"{target}#{make_id(section)}", f"{text}: {html.escape(section)}"
    return f'<a href="{target}">{text}</a>'


def table(head, body):
    """A Markdown table inside its own scrolling box; empty where there are no rows."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *body)]
    return ":::{div} scroll\n" + "\n".join(lines) + "\n:::\n" if body else ""


def verdict_table(columns):
    """{column: {verdict: count}} as a table with a row for each verdict and their sum."""
    body = [[badge(slug), *(count[slug] or "·" for count in columns.values())] for slug in claims.VERDICTS]
    total = ["all", *(sum(count.values()) for count in columns.values())]
    return table(["verdict", *columns], [*body, total])


def reading(low, high, bounds=None):
    """What was measured and what was allowed, in words: a test of yes or no says so."""
    if bounds == [1, 1] and {low, high} <= {0, 1}:
        return "true" if low else "not always true" if high else "not true"
    return claims.span(low, high) + (f", allowed {claims.span(*bounds)}" if bounds else "")


def count_tables(counts):
    """Verdicts per paper and per evidence level, and what chance lets expect."""
    by_paper = {f"[{paper}](./{paper}.md)": counts["papers"][paper] for paper in papers()}
    return "\n".join([
        verdict_table(by_paper | {"all": counts["all"]}), verdict_table(counts["evidence"]),
        f"{counts['statistical']} of these verdicts are statistical: they rest on an interval that misses "
        f"the truth with a small probability. If every interval is honest, expect at most "
        f"{counts['expected_false']:g} of them to be false by chance.\n"])


def _cells(row, sources):
    entry = claims.claim(row["paper"], row["id"])
    why = row["reason"] or (f"{claims.span(*row['interval'])} (n = {row['n']})" if row["interval"] else "")
    return {"claim": f"<code>{row['paper']}/{html.escape(row['id'])}</code> {html.escape(entry['says'])} "
                     f"<small>{html.escape(str(entry['where']))}</small>",
            "verdict": badge(row["verdict"]), "evidence": row["evidence"] or "",
            "why, or interval": html.escape(why), "settled in": link(row, sources), "kind": row["kind"]}


def scoreboard_html(rows, sources):
    """All rows as an HTML table with filters; ``_static/scoreboard.js`` only hides rows."""
    choices = {"paper": papers(), "kind": KINDS, "verdict": claims.VERDICTS, "evidence": claims.EVIDENCE}
    selects = "".join(
        f'<label>{name} <select name="{name}"><option value="">all</option>'
        + "".join(f"<option>{choice}</option>" for choice in options) + "</select></label>"
        for name, options in choices.items())
    head = "".join(f"<th>{column}</th>" for column in _cells(rows[0], sources))
    body = "\n".join(
        "<tr " + " ".join(f'data-{name}="{row[name] or ""}"' for name in choices) + ">"
        + "".join(f"<td>{cell}</td>" for cell in _cells(row, sources).values()) + "</tr>" for row in rows)
    return (f'<form id="filters">{selects}<label>search <input type="search" name="words"></label>'
            f'<output>{len(rows)} claims</output></form>\n'
            f'<div class="scroll"><table id="claims-table" class="claims">'
            f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n")


def scoreboard_csv(rows):
    """The rows as CSV, the interval in the columns low and high."""
    import pandas as pd
    frame = pd.DataFrame([r | dict(zip(("low", "high"), r["interval"] or (None, None))) for r in rows])
    return frame.drop(columns="interval").astype({"n": "Int64"}).to_csv(index=False)


def _measured(row, sources):
    """What decided a verdict, and what would have been allowed."""
    if not row["interval"] or not all(map(math.isfinite, row["interval"])):
        return ""
    source = sources.get(f"{row['paper']}/{row['id']}", {})
    result = source.get("result", {"when": [], "atoms": [], "printed": []})
    if source.get("table") is not None:
        result = claims.measure_record(row["paper"], claims.claim(row["paper"], row["id"]), source["table"])
    bounds = next((a["allowed"] for a in [*result["when"], *result["atoms"], *result["printed"]]
                   if [a["low"], a["high"]] == list(row["interval"])), None)
    return f"Measured: {reading(*row['interval'], bounds)} (n = {row['n']})."


def _entries(rows, sources):
    for paper in papers():
        mine = [r for r in rows if r["paper"] == paper]
        if mine:
            yield f"### {{cite:t}}`{paper}`\n"
        for row in mine:
            says = claims.claim(paper, row["id"])["says"]
            yield (f"{badge(row['verdict'])} `{row['id']}`\n: {md(says)}\n\n  *Why:* {md(row['reason'])}.\n"
                   f"  {md(_measured(row, sources))} {link(row, sources)}\n")


def failed_page(rows, sources):
    """Every claim that fails, is undecided, or did not run although a rule is there, with the reason."""
    text = []
    for slug, title in (("fails", "Claims that fail"), ("undecided", "Claims left open")):
        mine = [r for r in rows if r["verdict"] == slug]
        text += [f"## {title} ({len(mine)})\n", *(_entries(mine, sources) if mine else ["None.\n"])]
    waiting = [r for r in rows if r["verdict"] == "not-run" and r["reason"] != "no chapter yet"]
    text.append(f"## Claims with a rule that have not run ({len(waiting)})\n")
    for reason in sorted({r["reason"] for r in waiting}):
        mine = [r for r in waiting if r["reason"] == reason]
        listed = "\n".join(f"- {{cite:t}}`{r['paper']}` `{r['id']}`: "
                           f"{md(claims.claim(r['paper'], r['id'])['says'])}" for r in mine)
        text.append(f":::{{dropdown}} {md(reason)} ({len(mine)})\n{listed}\n:::\n")
    untold = sum(r["reason"] == "no chapter yet" for r in rows)
    return "\n".join([*text, f"{untold} further claims have no chapter yet; the scoreboard lists them.\n"])


def _told(atom):
    what = (atom["says"] or atom["q"]).removeprefix("as printed: ")
    return f"{md(what)}: {md(reading(atom['low'], atom['high'], atom['allowed']))}, **{atom['outcome']}**"


def measured_erratum(row, source, k):
    """What the run measured of the printed form of erratum `k` and of the corrected one, if it did."""
    printed = [a for a in source["result"]["printed"] if a["erratum"] == k] if source else []
    if not printed:
        return ""
    atoms = source["result"]["atoms"]
    held = sum(a["outcome"] == "holds" for a in atoms)
    others = [f"; first that does not: {_told(a)}" for a in atoms if a["outcome"] != "holds"]
    return (f"Measured here\n: As printed: {'; '.join(map(_told, printed))}.\n\n"
            f"  As corrected: {held} of {len(atoms)} tests hold{''.join(others[:1])}. "
            f"{badge(row['verdict'])} {link(row, {row['paper'] + '/' + row['id']: source})}\n")


def _erratum(number, row, entry, k, source):
    name, erratum = anchor("erratum", row["paper"], row["id"], k), entry["erratum"][k - 1]
    titles = {"printed": "Printed", "corrected": "Corrected", "why": "Why", "evidence": "Evidence"}
    fields = "\n".join(f"{title}\n: {md(erratum[key])}\n" for key, title in titles.items() if key in erratum)
    permalink = f'<a class="permalink" href="#{name}" title="link to this erratum">#</a>'
    return (f":::{{div}} erratum\n({name})=\n**{number}. {md(entry['where'])}**: {md(erratum['severity'])} "
            f"(`{row['id']}`) {permalink}\n\n{fields}\n{measured_erratum(row, source, k)}\n:::\n")


def errata_page(rows, sources):
    """Every erratum of the ledger, numbered within its paper, with an anchor that outlives renumbering."""
    text = []
    for paper in papers():
        entries = [(r, claims.claim(paper, r["id"])) for r in rows if r["paper"] == paper]
        listed = [(r, e, k) for r, e in entries for k in range(1, len(e.get("erratum", [])) + 1)]
        title = f"{md(claims.ledger(paper)['title'])} ({len(listed)})"
        text.append(f"({anchor('errata', paper)})=\n## {title}\n\n{{cite:t}}`{paper}`\n")
        text += [_erratum(number, row, entry, k, sources.get(f"{paper}/{row['id']}"))
                 for number, (row, entry, k) in enumerate(listed, 1)]
    return "\n".join(text)


def manifests():
    """{(chapter, kind): manifest} of the executed chapters and of the records on the papers' data."""
    files = {(name, kind): records.path(kind, name, ".json")
             for name in records.notebooks() for kind in ("executed", "full")}
    return {key: records.read(file) for key, file in files.items() if file.exists()}


def times_table(runs, full=False):
    """How long each page took, where and when; `full` adds tier, memory and commit."""
    head = ["page", "seconds", "machine", "date"] + ["tier", "peak memory", "commit"] * full
    return table(head, [
        [f"[](../notebooks/{name}.ipynb)", f"{m['seconds']:.0f}", md(m["machine"]), f"<time>{m['date'][:10]}</time>"]
        + [m["tier"], f"{m['peak_memory_mib']} MiB" if m["peak_memory_mib"] else "–", f"`{m['commit'] or 'none'}`"] * full
        for (name, _), m in runs.items()])


def records_table():
    """What was recorded: sweeps over training runs and runs on the papers' data, what each cost, and whether it is current."""
    return table(["page", "record"], [[f"[](../notebooks/{name}.ipynb)", line.replace("|", "&#124;")] for name in records.notebooks()
                                      for line in records.behind(name)])


def status_page(runs, flips):
    """Executions, records, versions, and verdicts that differ from the accepted ones."""
    installed = table(["package", "version"],
                      [["Python", platform.python_version()], *([p, version(p)] for p in PACKAGES)])
    differ = "\n".join(f"- {md(line)}" for line in flips[:50]) or "None: this build says what was accepted."
    return f"## Pages\n\n{times_table(runs, full=True)}\n## Records\n\n{records_table() or 'None yet.'}\n## Versions\n\n{installed}\n" \
           f"## Verdicts that differ from the accepted ones ({len(flips)})\n\n{differ}\n"


def summary(counts, runs):
    """The state of the book in a few sentences, for the welcome page."""
    def told(count):
        return ", ".join(f"{number} {badge(slug)}" for slug, number in count.items()) or "none"

    decided = {k: v for k, v in counts["all"].items() if v and k not in ("cited", "not-run")}
    text = f"Of **{sum(counts['all'].values())} claims**, {sum(decided.values())} have a verdict " \
           f"from executed code so far: {told(decided)}.\n"
    for level, how in (("reduced", "at a reduced size"), ("paper-settings", "at their settings")):
        if found := {k: v for k, v in counts["evidence"][level].items() if v and k != "not-run"}:
            text += f"\nOn the papers' own data, {how}, {sum(found.values())} claims were measured: {told(found)}.\n"
    if dates := sorted(m["date"] for m in runs.values()):
        text += (f'\nEvery chapter ran without error; the oldest run shown here is of <time class="age" '
                 f'datetime="{dates[0]}">{dates[0][:10]}</time>, the newest of {dates[-1][:10]}.\n')
    return text


def parameter_tables(notebooks):
    """The parameters of every chapter, as its own cell declares and the runner enforces them."""
    def code(text):
        return f"`{text}`".replace("|", "\\|")
    return "\n".join(
        f"### {name}\n\n[](../notebooks/{name}.ipynb)\n\n"
        + table(["parameter", "type", "default", "meaning and unit", "allowed"],
                [[code(p.name), code(p.type), code(p.default), md(p.meaning), md(p.allowed)]
                 for p in parameters(notebook).values()]) for name, notebook in notebooks.items())


def paper_page(paper, rows, runs):
    """Counts of one paper, its errata, and the times of its chapters."""
    mine = [r for r in rows if r["paper"] == paper]
    counted = {kind: {slug: sum((r["kind"], r["verdict"]) == (kind, slug) for r in mine)
                      for slug in claims.VERDICTS} for kind in KINDS if any(r["kind"] == kind for r in mine)}
    errata = sum(len(e.get("erratum", [])) for e in claims.ledger(paper)["claims"])
    return "\n".join([
        verdict_table(counted),
        f'<a href="scoreboard.html#paper={paper}">These {len(mine)} claims on the scoreboard</a>; '
        f"[its {errata} errata](#{anchor('errata', paper)}).\n",
        times_table({key: m for key, m in runs.items() if key[0].split("/")[0] == paper})])


def generate(rows):
    """Write the generated parts of the book to ``_build/generated``, from the rows of `claims.scoreboard`."""
    notebooks = {name: records.read(records.path("source", name)) for name in records.notebooks()}
    sources = {key: source | {"headings": headings(notebooks[source["notebook"]])}
               for key, source in records.sources().items()}
    counts, runs = claims.counts(rows), manifests()
    board = json.dumps(claims.finite({"claims": rows, "counts": counts}), ensure_ascii=False)
    parts = {"summary.md": summary(counts, runs), "times.md": times_table(runs),
             "counts.md": count_tables(counts), "scoreboard.html": scoreboard_html(rows, sources),
             "scoreboard.csv": scoreboard_csv(rows), "scoreboard.json": board,
             "failed.md": failed_page(rows, sources),
             "errata.md": errata_page(rows, sources), "status.md": status_page(runs, records.flips(rows)),
             "parameters.md": parameter_tables(notebooks),
             **{f"{paper}.md": paper_page(paper, rows, runs) for paper in papers()}}
    for name, text in parts.items():
        records.write(claims.project_root() / "_build" / "generated" / name, text)
