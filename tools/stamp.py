"""Write the repository's address, which stands in _config.yml alone, into the set-up cell of every chapter.

python tools/stamp.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import yaml
from book import ROOT, chapter_paths

PLACEHOLDER = "https://github.com/OWNER/REPOSITORY"
ADDRESS = re.compile(r"(?<=bitlib\[book\] @ git\+)[^\"'\s]+")


def address(root: Path = ROOT) -> str:
    """The repository's address as _config.yml gives it."""
    return yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"].rstrip("/")


def stamped(text: str, url: str) -> str:
    return ADDRESS.sub(lambda _: url, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if an address differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    args = parser.parse_args(argv)
    url = address(args.root)
    wrong = []
    for path in chapter_paths(args.root):
        text = path.read_text(encoding="utf-8")
        new = stamped(text, url)
        if new == text:
            continue
        wrong.append(path.name)
        if not args.check:
            path.write_text(new, encoding="utf-8")
    if args.check and wrong:
        print(f"another address than {url} in {', '.join(wrong)}; run `make export`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
