"""The tables in the text of the paper."""

from __future__ import annotations

import re
from typing import NamedTuple


class PrintedRow(NamedTuple):
    """A row as the paper prints it: the cells before its numbers, and these without differences."""

    cells: list[str]
    numbers: list[str]

    def by_shots(self) -> dict[int, list[float]]:
        """Return the numbers of 1 and 5 shots: by fold with the mean, or the mean alone."""
        values = [float(number) for number in self.numbers]
        assert len(values) in (1, 2, 5, 10), self
        half = len(values) // 2
        return {1: values[:half], 5: values[half:]} if half in (1, 5) else {1: values}


def printed_tables(text: str) -> dict[str, list[PrintedRow]]:
    """Read every table: a caption, then lines of cells until an empty one."""
    found: dict[str, list[PrintedRow]] = {}
    rows: list[PrintedRow] | None = None
    inside = False
    for line in text.splitlines():
        caption = re.match(r"Table (\d+): ", line)
        if caption:
            rows, inside = found.setdefault(f"T{caption[1]}", []), False
        elif rows is not None and "\t" in line:
            inside = True
            cells = [
                re.sub(r"<[^>]+>|\([+-][\d.]+\)", "", cell).strip() for cell in line.split("\t")
            ]
            numbers = [cell for cell in cells if re.fullmatch(r"\d+\.\d+", cell)]
            if numbers:
                first = cells.index(numbers[0])
                rows.append(PrintedRow(cells[:first], numbers))
        elif inside and not line.strip():
            rows = None
    return found
