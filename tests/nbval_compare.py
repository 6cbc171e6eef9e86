"""What nbval compares (`pytest -p tests.nbval_compare`): text and printed values, not pictures, tables' HTML or chatter.

A verdict's text lists the outcome of every atom without a digit, so a flipped outcome fails on any machine.
"""
from lib.claims import MIME

SKIPPED = ("image/svg+xml", "image/png", "text/html", "stderr", "application/papermill.record/text/plain", MIME)


def pytest_collectstart(collector):
    """nbval's own hook: a collected notebook carries the outputs that it leaves out."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += SKIPPED
