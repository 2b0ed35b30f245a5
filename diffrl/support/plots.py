"""The look of our plots and pages: colours, axes, the style sheet; and writing them, whole or not at all."""

import io
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, beginning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DISTINCT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Colours that colour-blind people tell apart: those of Okabe and Ito 2008, but for the last two."""
BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9822b", "#3c9d5f", "#8a8a8a"

PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: .2em }
h2 { font-size: 1.1em; margin: 2em 0 0 }
p.about { color: #555; margin-top: 0 }
table { border-collapse: collapse; width: 100% }
td, th { padding: .35em .8em .35em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4 }
th { color: #666; font-weight: 600 }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td:first-child, h2 { overflow-wrap: anywhere }
img { max-width: 100%; margin-top: 1em }
@media (max-width: 620px) {
  td.n, th.n { white-space: normal }
  td, th { padding-right: .5em; font-size: 13px }
}
"""
"""The style sheet that our HTML pages share."""

COMPARED = "<title>diffrl compare</title>"
"""What stands at the head of a page of `diffrl compare`, by which it is known again."""


def comparison_at(out: Path) -> bool:
    """Whether a comparison of ours is at `out`, with its picture and numbers beside it, which a new one replaces.

    Raises UserError where what is there is none of ours, and where the three files would have one name.
    """
    files = [out, *(out.with_suffix(end) for end in (".png", ".csv") if out.name)]
    if len(set(files)) < 3:  # of "." and "/" there is no name to end otherwise
        raise UserError(f"--out is {str(out)!r}, and is to be a page, beside a .png and a .csv: end it in .html.")
    if out.is_file() and COMPARED in beginning(out):
        return True
    if there := next((file for file in files if file.exists()), None):
        raise UserError(f"{there} is no comparison of ours, and is not overwritten: choose another --out.")
    return False


def write_comparison(out: Path, page: str, picture: bytes, numbers: str) -> list[Path]:
    """Write a comparison's page (HTML), and its picture (PNG) and numbers (CSV) beside it; give the three paths.

    All three are on the disk before the first takes its place, and the page is that first one: by it `comparison_at`
    knows the others. So a failure changes nothing, and after a kill between two of them the same --out is taken again.
    """
    files = {out.with_suffix(".csv"): numbers.encode(), out.with_suffix(".png"): picture, out: page.encode()}
    with ExitStack() as stack:  # leaves in the reverse order
        for path, content in files.items():
            stack.enter_context(atomic_path(path)).write_bytes(content)
    return list(reversed(files))


def write_png(figure: "Figure", file: Path | BinaryIO, dpi: int) -> None:
    """Write a figure as PNG, `dpi` dots an inch: as `savefig` does, which draws one that lays itself out twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]


def png(figure: "Figure") -> bytes:
    """A figure as PNG for a page: 110 dots an inch."""
    content = io.BytesIO()
    write_png(figure, content, 110)
    return content.getvalue()


def new_figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    """A figure with one plot, `width` by `height` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def finish(ax: "Axes", legend: Literal["best", "upper left"] | None = "best") -> None:
    """Give a plot our grid, frame and legend; `legend` says where that is, in Matplotlib's words; None: it has none."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if legend is not None:
        ax.legend(frameon=False, loc=legend)


def save(figure: "Figure", path: Path, colours: int | None = None) -> Path:
    """Write a figure as PNG, whole or not at all; with a palette of so many `colours` a quarter of the size or so."""
    from PIL import Image

    with atomic_path(path) as temporary:
        write_png(figure, temporary, 150)
        if colours is not None:
            with Image.open(temporary) as image:
                image.convert("RGB").quantize(colours).save(temporary, format="png", optimize=True)
    return path


def svg(figure: "Figure") -> str:
    """A figure as SVG, whose text is text; the same each time."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "diffrl"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the viewer's fonts may have it
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return content.getvalue()


def save_pdf(figures: Iterable["Figure"], path: Path) -> Path:
    """Write figures as the pages of a PDF, as papers take them, whole or not at all; the same each time.

    One file for all: most of the time goes into the fonts, which are embedded once a file.
    """
    import matplotlib
    from matplotlib.backends.backend_pdf import PdfPages

    with atomic_path(path) as temporary, matplotlib.rc_context({"pdf.fonttype": 42}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        with PdfPages(temporary, metadata={"CreationDate": None}) as pages:
            for figure in figures:
                pages.savefig(figure)
    return path
