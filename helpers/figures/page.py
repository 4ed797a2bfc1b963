"""Put what a command made into a page."""

from pathlib import Path

from helpers import files


def put(path: Path, name: str, text: str) -> None:
    """Put `text` into the page at `path`, between ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = path.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    with files.replacing(path) as draft:
        draft.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
