"""Attacks on any model of the protocol. Nothing is re-exported: a page's digest depends only on what it uses."""
