"""What the ladder showed, written down: STATUS.md, the README's table, and what the catalogue shows.

python -m paperzoo.engine.proof FOLDER      from the files <slug>.json that the contract tests left there (`make prove`)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from paperzoo.catalog.cards import papers
from paperzoo.catalog.fingerprint import record
from paperzoo.catalog.status import PATH, read_status
from paperzoo.engine.files import write_text
from paperzoo.engine.verify import readme_table, status_page
from paperzoo.errors import DataError


def write_status(status: dict[str, Any], keep_others: bool) -> Path | None:
    """slug -> step -> what was seen, into the catalogue and, in a checkout, STATUS.md (its path is returned) and README.md.

    Args:
        keep_others: papers that are not in `status` keep what they had.
    """
    if keep_others:
        known = read_status() | status
        status = {slug: known[slug] for slug, paper in papers().items() if paper.has_code and slug in known}
    write_text(PATH, json.dumps(status, indent=1, ensure_ascii=False) + "\n")
    root = Path(__file__).parents[3]
    if not (root / "pyproject.toml").exists():
        return None
    write_text(root / "STATUS.md", status_page(papers(), status))
    readme = root / "README.md"
    write_text(readme, readme_table(readme.read_text(encoding="utf-8"), papers(), status))
    return root / "STATUS.md"


def main() -> None:
    folder = Path(sys.argv[1])
    known, status = papers(), {}
    for path in sorted(folder.glob("*.json")):
        try:
            status[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(path, f"is no JSON ({error})") from None
    good = [known[slug] for slug, steps in status.items() if all(s["state"] != "failed" for s in steps.values())]
    print(f"{len(good)} of {len(status)} papers pass; wrote {write_status(status, keep_others=True)}")
    record(good)


if __name__ == "__main__":
    main()
