"""The table of cells as a file that grows by a row at a time, so that an hour's work outlives its process."""

from __future__ import annotations

from pathlib import Path

from tests.faults.laboratory import Finding

HEAD = (
    "| fault | kept | attempts | steps redone | recovered in s | whole job, s |\n|---|---|---|---|---|---|\n"
)


class Table:
    """Rows, printed and, with `path`, appended to a Markdown file. What the file has already is not done again."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.kept: dict[str, str] = {}  # name of a cell -> "yes", or what was wrong
        if path is not None and path.is_file():
            rows = [line.split(" | ") for line in path.read_text().splitlines()[2:] if line.endswith(" |")]
            self.kept = {row[0].removeprefix("| "): row[1] for row in rows if len(row) == 6}
        elif path is not None:
            path.write_text(HEAD)
        print(HEAD, end="", flush=True)

    def add(self, finding: Finding) -> None:
        line, name = row(finding), _name(finding)
        print(line, end="", flush=True)
        if self._path is not None and name not in self.kept:
            with self._path.open("a") as file:
                file.write(line)
        self.kept[name] = _kept(finding)


def row(finding: Finding) -> str:
    recovered = "" if finding.recovered_s is None else f"{finding.recovered_s:.1f}"
    return (
        f"| {_name(finding)} | {_kept(finding)} | {finding.attempts} | {finding.redone_steps} | {recovered}"
        f" | {finding.seconds:.0f} |\n"
    )


def _name(finding: Finding) -> str:
    return str(finding.cell or f"{finding.kind}: none")


def _kept(finding: Finding) -> str:
    """One cell of a table, whatever an error's text holds."""
    problems = "; ".join(finding.problems).replace("|", "/")
    return " ".join(problems.split()) or ("yes, replayed" if finding.replayed else "yes")
