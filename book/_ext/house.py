"""Sphinx extension: a footer on how each chapter was executed; no launch button that leads nowhere."""
import html

from lib import records


def note(record):
    """The footer of one chapter, from its manifest, as HTML."""
    commit = f", commit <code>{html.escape(record['commit'])}</code>" if record["commit"] else ""
    return (f'<div class="provenance">Executed {record["date"][:10]} in {record["seconds"]:.0f} s on '
            f'{html.escape(record["machine"])}{commit}. '
            f'Rerun: <code>repro run notebooks/{record["notebook"]}.ipynb</code></div>')


def add_note(app, pagename, templatename, context, doctree):
    """Append the footer to the body of a chapter that has a manifest."""
    file = records.path("executed", pagename.removeprefix("notebooks/"), ".json")
    if pagename.startswith("notebooks/") and file.exists():
        context["body"] += note(records.read(file))


def drop_thebe(app, pagename, templatename, context, doctree):
    """Jupyter Book always adds thebe, which needs a network and a live server; no page of this book does."""
    context["script_files"] = [f for f in context["script_files"]
                               if "thebe" not in str(f.filename) + f.attributes.get("body", "")]


def mend_theme_options(app, config):
    """What Jupyter Book hands to the theme, mended in two places.

    The theme stops with an error where launch buttons are wanted and no repository is named.
    It adds an empty bar with a second search box, and then binds the button of the menu there, out of sight.
    """
    options = config.html_theme_options
    options["navbar_persistent"] = []
    if not options.get("repository_url"):
        options["launch_buttons"] = {}


def setup(app):
    """Register with Sphinx."""
    app.connect("config-inited", mend_theme_options)
    app.connect("html-page-context", add_note)
    app.connect("html-page-context", drop_thebe)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
