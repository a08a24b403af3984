#!/usr/bin/env python3
"""Packs the working tree as it is now into a tarball: what git knows, your changes included, and new files.

  python3 scripts/launch/pack.py FILE.tar.gz

What git ignores stays here. The first member, .copied, lists the others, so that the next copy can remove them.
"""

from __future__ import annotations

import io
import pathlib
import subprocess
import sys
import tarfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> int:
  if len(argv) != 1 or argv[0].startswith("-"):
    print(__doc__, file=sys.stderr)
    return 2
  command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
  listed = subprocess.run(command, capture_output=True, text=True)
  if listed.returncode:
    print(f"pack: the code is copied from a git clone: {listed.stderr.strip()}", file=sys.stderr)
    return 2
  names = sorted(n for n in set(listed.stdout.split("\0")) if n and ((ROOT / n).is_file() or (ROOT / n).is_symlink()))
  if "constraints.txt" not in names:
    print(
      "pack: constraints.txt, the lock of the packages, is missing: `git checkout constraints.txt`", file=sys.stderr
    )
    return 2
  path = pathlib.Path(argv[0])
  path.parent.mkdir(parents=True, exist_ok=True)
  manifest = "".join(f"{n}\0" for n in names).encode()
  info = tarfile.TarInfo(".copied")
  info.size = len(manifest)
  with tarfile.open(path, "w:gz") as tar:
    tar.addfile(info, io.BytesIO(manifest))
    for name in names:
      tar.add(str(ROOT / name), arcname=name, recursive=False)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
