"""One self-contained HTML page about one or many runs, which opens from disk without a network.

    python -m normfree.report RUN [RUN ...] --out report.html

    packing.py    numbers into the page: which records, and how they are written down
    data.py       what the figures draw, of one run
    tables.py     what is written out in tables, without a line of script
    page.py       the page: template, style and scripts in one file
    assets/       the template, the style and the scripts

Like the figures, it reads runs and never imports torch.
"""

from normfree.report.page import build, write

__all__ = ["build", "write"]
