"""Generative classifiers. Nothing is re-exported: a page's digest depends only on what it uses."""
