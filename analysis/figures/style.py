"""One look for all figures: one colour, marker and line per method, reproducible files."""

import io
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter

from analysis.figures import caption

# Okabe and Ito's colours, safe for colour-blind readers; their yellow is too pale for thin lines.
BLACK, GREY = "#000000", "#777777"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

_COLORS = [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*"]

LineStyle = Any  # "-" or (offset, dashes), which matplotlib's own type does not have
_SOLID, _DASHED, _DOTTED, _DASHDOT = "-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))
_LINES: list[LineStyle] = [_SOLID, _DASHED, _DOTTED, _DASHDOT]


class Look(NamedTuple):
    """How one method is drawn everywhere. Marker and line tell methods apart in grey."""

    color: str
    marker: str
    linestyle: LineStyle

    def size(self, points: float = 4.5) -> float:
        """The marker's size. Dots and markers of mere strokes are drawn larger than filled ones."""
        return 1.6 * points if self.marker in "1234+." or "$" in self.marker else points


# The looks of the published figures, which must not change. A new method needs no row: its look
# follows from its name.
_PUBLISHED_LOOKS = {
    "fedara": Look(VERMILLION, "o", _SOLID),
    "lora": Look(BLUE, "s", _SOLID),
    "slora": Look(GREEN, "^", _DASHED),
    "head_only": Look(GREY, "x", _DOTTED),
    "full": Look(BLACK, "*", _SOLID),
    "fedara_exact": Look(VERMILLION, "P", _DASHED),
    "adalora": Look(PURPLE, "D", _SOLID),
    "ffa_lora": Look(SKY, "v", _DASHED),
    "federa": Look(ORANGE, "p", _SOLID),
    "fedadapter": Look(GREEN, "h", _SOLID),
    "bitfit": Look(GREY, "d", _DASHED),
    "hetlora": Look(PURPLE, "<", _DASHED),
    "flexlora": Look(ORANGE, ">", _DASHED),
    "flora": Look(SKY, "8", _SOLID),
    "rolora": Look(BLUE, "X", _DASHDOT),
    "fedsa_lora": Look(GREEN, "+", _DASHDOT),
    "lora_a2": Look(ORANGE, "1", _DASHDOT),
    "fedex_lora": Look(BLUE, "2", _DASHED),
    "fed_sb": Look(PURPLE, "3", _DASHDOT),
    "fedsvd": Look(SKY, "4", _DASHDOT),
    "fedrot_lora": Look(BLUE, r"$\odot$", _DOTTED),
    "raflora": Look(ORANGE, r"$\boxplus$", _DOTTED),
    "lora_fair": Look(GREEN, r"$\boxtimes$", _DOTTED),
    "ravan": Look(PURPLE, "H", _DOTTED),
    "fslora": Look(SKY, ".", _DOTTED),
    "fedsmooth_lora": Look(BLACK, r"$\otimes$", _DASHDOT),
}

# Merge paths are not methods: they never share a figure.
PATH_LOOKS = {
    "allgather": Look(VERMILLION, "o", _SOLID),
    "split": Look(BLUE, "s", _SOLID),
    "allreduce": Look(GREEN, "^", _SOLID),
    "dense": Look(BLACK, "D", _SOLID),
}
_PAD_INCHES = 0.04
_MISSING = r"Glyph (\d+) .*missing from"  # matplotlib's warning
_MOST_INCHES = 300.0  # a PNG has less than 2^16 pixels each way
MODELLED: LineStyle = _DASHED  # the line of everything that is computed and not measured

_RC = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,  # also what the layout is made for: rounding of text depends on it
    "pdf.fonttype": 42,  # TrueType: journals refuse type 3
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine has it
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
}


def look(method: str) -> Look:
    """The look of a method, which depends on its name alone."""
    if method in _PUBLISHED_LOOKS:
        return _PUBLISHED_LOOKS[method]
    number = zlib.crc32(method.encode())  # hash() of a str differs between processes
    number, color = divmod(number, len(_COLORS))
    number, marker = divmod(number, len(_MARKERS))
    return Look(_COLORS[color], _MARKERS[marker], _LINES[number % len(_LINES)])


def setting_look(method: str, place: int) -> tuple[Look, str]:
    """Look and marker fill of a method's setting number `place`.

    Number 0 has the method's own look; others differ in line and fill.
    """
    own = look(method)
    lines = [own.linestyle, *(line for line in _LINES if line != own.linestyle)]
    fill = own.color if place == 0 else "white"
    return Look(own.color, own.marker, lines[place % len(lines)]), fill


@contextmanager
def context() -> Iterator[None]:
    """The style on top of matplotlib's defaults; the user's matplotlibrc has no effect."""
    with matplotlib.style.context(["default", _RC]):
        yield


def plain_number(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis as a number that is read at once: 0.1, 10, 1,000."""
    return f"{value:,.12g}"


@contextmanager
def missing_letters() -> Iterator[list[str]]:
    """The letters, after the block, that its figures show as boxes, as their font lacks them."""
    letters: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", _MISSING)
        yield letters
    for warning in caught:
        if found := re.match(_MISSING, str(warning.message)):
            letters.append(chr(int(found[1])))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    letters[:] = sorted(set(letters))


def save(fig: Figure, path: Path, paragraphs: list[str]) -> list[Path]:
    """Write `path`.pdf, .png and .txt (the caption); returns the files.

    The same figure gives the same bytes on any day.
    """
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("pdf", "png")]
    path.parent.mkdir(parents=True, exist_ok=True)
    _take_names_literally(fig)
    fig.set_figwidth(min(fig.get_figwidth(), _MOST_INCHES))
    fig.set_figheight(min(fig.get_figheight(), _MOST_INCHES))
    # Lay the figure out once: savefig would do it for each file, and draw each one twice. Saving
    # restores the layout engine of the settings, so the setting is off until both files are there.
    fig.draw_without_rendering()
    box = fig.get_tightbbox().padded(_PAD_INCHES)
    with matplotlib.rc_context({"figure.constrained_layout.use": False}):
        fig.set_layout_engine(None)
        dates = {"CreationDate": None, "Producer": None, "Creator": None}
        for file, metadata in zip(files, (dates, {"Software": None}), strict=True):
            content = io.BytesIO()  # on a full disk matplotlib's own writer fails with a riddle
            fig.savefig(content, format=file.suffix[1:], bbox_inches=box, metadata=metadata)
            file.write_bytes(content.getbuffer())
    return [*files, caption.write(path, paragraphs)]


def _take_names_literally(fig: Figure) -> None:
    """No formulas between dollar signs but in the numbers of logarithmic axes."""
    for text in fig.findobj(Text):
        text.set_parse_math(False)
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatter):
            _parse_math(axis.get_majorticklabels())
        if isinstance(axis.get_minor_formatter(), LogFormatter):
            _parse_math(axis.get_minorticklabels())


def _parse_math(labels: list[Text]) -> None:
    for label in labels:
        label.set_parse_math(True)
