"""The console's tables: the plan of a run and its results."""


def table(title: str, rows: dict[str, str]) -> str:
    """Names and values in two columns below a title; a value may have several lines."""
    width = max(map(len, rows))
    cells = [
        (name if number == 0 else "", line)
        for name, value in rows.items()
        for number, line in enumerate(value.split("\n"))
    ]
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in cells)])
