"""Tables of measurements as Markdown, printed row by row as the figures come."""


def head(first: str, *columns: str) -> None:
    """The head of a table; without `columns`, of one that compares two measurements."""
    cells = [first, *(columns or ("measured", "ratio", "limit"))]
    print(f"\n| {' | '.join(cells)} |\n|{'---|' * len(cells)}", flush=True)


def row(*cells: str | float | None) -> None:
    """A row; floats are ratios, and get three decimals."""
    texts = ("" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print(f"| {' | '.join(texts)} |", flush=True)
