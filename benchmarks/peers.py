"""Where the code of other projects says what docs/comparison.md says of them: one JSON document.

    pip install --no-deps --target peers trl verl areal miniverl
    python benchmarks/peers.py peers --output benchmarks/results/peers.json
    python benchmarks/peers.py --markdown benchmarks/results/peers.json

`peers.yaml` has the claims. Each is looked for in the installed package, and its file and line are written down
with the version and the date; a claim that is not there, or a line like what an empty cell denies, ends with exit
status 1 and its name. Nothing of a package is imported.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "benchmarks" / "peers.yaml"
READ = (".py", ".yaml", ".md", ".j2")


def main() -> None:
    """Looks up every claim, or prints the tables of what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where the packages are installed")
    parser.add_argument("--output", type=Path, help="where the JSON goes, in place of stdout")
    parser.add_argument("--markdown", type=Path, help="print the tables of this JSON, and stop")
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        print(markdown(json.loads(arguments.markdown.read_text())))
        return
    if arguments.folder is None:
        parser.error("name the folder of the packages")
    document, faults = look_up(arguments.folder)
    if faults:
        sys.exit("\n".join(faults))
    text = json.dumps(document, indent=1) + "\n"
    arguments.output.write_text(text) if arguments.output else print(text, end="")


def look_up(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The document of all claims with their lines, and what is no longer as it is said."""
    import yaml  # the table of a finished document needs no claims

    claims = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    installed = {found.name: found for found in distributions(path=[str(folder)])}
    peers, faults = {}, []
    for name, peer in claims["peers"].items():
        if (package := peer.get("package")) is None:
            peers[name] = {"repository": peer["repository"], "read": str(peer["read"])}
        else:
            peers[name] = {"package": package, "version": installed[package].version}
    rows = []
    for claim in claims["rows"]:
        cells = {}
        for name, peer in claims["peers"].items():
            distribution = installed.get(peer.get("package", ""))
            cells[name] = cell = _cell(claim[name], distribution)
            if fault := cell.pop("fault", None):
                faults.append(f"{claim['row']}, {name}: {fault}")
        rows.append({"row": claim["row"], "kdpipe": claim["kdpipe"], "peers": cells})
    return {"date": datetime.now(UTC).date().isoformat(), "peers": peers, "rows": rows}, faults


def _cell(claim: dict[str, Any], distribution: Distribution | None) -> dict[str, Any]:
    """What is shown, and where it was found; with `fault`, if it was not."""
    if distribution is None:
        return {key: claim[key] for key in ("says", "in", "name", "commit") if key in claim}
    if denied := claim.get("nothing_like"):
        for path in sorted(str(file) for file in distribution.files or ()):
            if path.endswith(READ) and (line := _line(distribution, path, "|".join(denied))):
                return {"nothing_like": denied, "fault": f"{path}:{line} is like what was not found"}
        return {"nothing_like": denied}
    found = {path: _line(distribution, path, wanted) for path, wanted in claim["found"].items()}
    missing = [path for path, line in found.items() if line is None]
    fault = {"fault": f"no longer found in {', '.join(missing)}"} if missing else {}
    return {"says": claim["says"], "found": found} | fault


def _line(distribution: Distribution, path: str, expression: str) -> int | None:
    """The first line of a file of the package that is like this, from 1."""
    text = distribution.read_text(path) if path == "METADATA" else None
    if text is None:
        file = Path(str(distribution.locate_file(path)))
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = re.search(expression, text, re.MULTILINE | re.IGNORECASE)
    return None if found is None else text.count("\n", 0, found.start()) + 1


def markdown(document: dict[str, Any]) -> str:
    """The table of docs/comparison.md, and the table of where each cell was found."""
    names = list(document["peers"])
    words = [["", "kdpipe", *names]]
    places = [["", *(_source(name, peer) for name, peer in document["peers"].items())]]
    for row in document["rows"]:
        cells = [row["peers"][name] for name in names]
        words.append([row["row"], row["kdpipe"], *(cell.get("says", "") for cell in cells)])
        places.append([row["row"], *(_place(cell) for cell in cells)])
    return f"{_table(words)}\n\n<!-- where -->\n\n{_table(places)}"


def _source(name: str, peer: dict[str, str]) -> str:
    return f"{name} {peer['version']}" if "version" in peer else f"{peer['repository']}, {peer['read']}"


def _place(cell: dict[str, Any]) -> str:
    """A cell's file and line; at a repository, its file, what to look for, and the commit."""
    if found := cell.get("found"):
        return ", ".join(f"`{path}:{line}`" for path, line in found.items())
    if "commit" not in cell:
        return ""
    where = cell["in"] if cell["name"] == "the file" else f"{cell['in']}`, `{cell['name']}"
    return f"`{where}`, {cell['commit'][:7]}"


def _table(rows: list[list[str]]) -> str:
    head, *body = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    main()
