"""Fetch the JavaScript that the site and its tests use and that is not committed, each a pinned npm package.

    python tools/vendor.py [onnxruntime-web axe-core]

npm packs each package into _build/vendor/, its hash is compared with the one below, and the few files that are needed
are unpacked. Where there is no npm or no network, it says so and exits 0: the site is then built without the demo, and
the page says why.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from book import ROOT

VENDOR = ROOT / "_build" / "vendor"
RUNTIME_LIMIT = 15_000_000  # bytes that the demo may load, its network included


@dataclass(frozen=True)
class Package:
    version: str
    integrity: str  # of the packed file, as npm gives it: SHA-512 in base64
    files: tuple[str, ...]


PACKAGES = {
    # 1.18 is the last whose WebAssembly without threads is small enough for the demo's 15 MB
    "onnxruntime-web": Package(
        "1.18.0",
        "o1UKj4ABIj1gmG7ae0RKJ3/GT+3yoF0RRpfDfeoe0huzRW4FDRLfbkDETmdFAvnJEXuYDE0YT+hhkia0352StQ==",
        ("dist/ort.wasm.min.js", "dist/ort-wasm-simd.wasm"),
    ),
    "axe-core": Package(
        "4.14.1",
        "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
        ("axe.min.js",),
    ),
}


class VendorError(Exception):
    """A package could not be fetched; the message says why."""


def folder(name: str) -> Path:
    return VENDOR / f"{name}-{PACKAGES[name].version}"


def available(name: str) -> bool:
    return all((folder(name) / Path(file).name).exists() for file in PACKAGES[name].files)


def fetch(name: str) -> None:
    """Put the files of a package into its folder, unless they are there. Raises VendorError."""
    if available(name):
        return
    package, npm = PACKAGES[name], shutil.which("npm")
    if npm is None:
        raise VendorError("there is no npm here")
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", f"{name}@{package.version}", "--silent", "--pack-destination", temporary]
        try:
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise VendorError("npm took longer than five minutes") from None
        archives = list(Path(temporary).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise VendorError(f"npm could not fetch it: {done.stderr.strip().splitlines()[-1:] or 'no reason given'}")
        found = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
        if found != package.integrity:
            raise VendorError(f"its hash is {found}, not the pinned one; nothing of it is used")
        folder(name).mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            for file in package.files:
                member = archive.extractfile(f"package/{file}")
                if member is None:
                    raise VendorError(f"the package has no {file}")
                (folder(name) / Path(file).name).write_bytes(member.read())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", choices=[*PACKAGES, []], help="all of them by default")
    args = parser.parse_args(argv)
    for name in args.packages or PACKAGES:
        try:
            fetch(name)
        except VendorError as error:
            print(f"{name} {PACKAGES[name].version} is left out: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
