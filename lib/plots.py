"""The common style of all figures: one colour per model and one marker per attack for the whole book.

Colours are Okabe and Ito's palette, which readers with any of the common colour deficiencies can tell apart.
Lines, text and ticks are a mid grey that reads on a white and on a dark page; figures are transparent.
"""
import math

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.ticker import NullLocator

INK = "#6b7280"          # text and axes, contrast above 4.5 on white and above 3.5 on the dark page
COLOURS = {"Base": "#0072B2", "Reweight": "#D55E00", "Split": "#009E73", "SDIM": "#CC79A7", "Twin": "#6b7280", "PixelCNN++": "#E69F00",
           "clean": "#0072B2", "adversarial": "#D55E00", "hybrid": "#009E73"}
CLASSES = ("#0072B2", "#D55E00", "#009E73")      # class 0, class 1, and a third region where a figure needs one
SHADES = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#6b7280")    # lines without a model
MARKERS = {"PGD": "o", "CW": "s", "DDN": "D", "boundary": "^", "DeepFool": "v", "FGSM": "P", "noise": "x"}
WIDTH = 7.0              # inches, the text column of the book


def use():
    """Set the style once, in a notebook's cell of imports."""
    sns.set_theme(style="ticks", context="notebook", font_scale=.95, palette=SHADES, rc={
        "figure.figsize": (WIDTH, 3.6), "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2, "lines.markersize": 5,
        "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.edgecolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.titlesize": "medium"})


def panels(columns, rows=1, height=3.2, **kwargs):
    """A row (or grid) of axes as wide as the text column; `height` in inches a row."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height * rows), **kwargs)


def name_line(ax, x, y, text, colour, **kwargs):
    """Write a line's name beside it, in its colour: read at once, no legend."""
    ax.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", color=colour, va="center", **kwargs)


def band(ax, x, mid, low, high, colour, label=None):
    """A curve with its interval as a band."""
    ax.plot(x, mid, color=colour, label=label)
    ax.fill_between(x, low, high, color=colour, alpha=.2, linewidth=0)


def plain_log(axis):
    """Ticks of a finished logarithmic axis as plain numbers, at 1, 2 and 5 times the powers of ten in view."""
    low, high = axis.get_view_interval()
    ticks = [digit * 10.0 ** power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high))) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())
