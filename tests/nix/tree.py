"""A tree of small files in one text, as tests/nix/rendered/ has them: `tree.py TEXT DIRECTORY` unpacks it.

A line `==> PATH <==` begins a file; `==> PATH -> TARGET <==` is a symbolic link.
"""

import pathlib
import re
import sys

HEAD = re.compile(r"^==> (\S+)(?: -> (\S+))? <==\n", re.MULTILINE)


def pack(tree):
    """The text of `{"files": {path: text}, "links": {path: target}}`."""
    files = {path: f"==> {path} <==\n{text}" for path, text in tree["files"].items()}
    links = {path: f"==> {path} -> {target} <==\n" for path, target in tree["links"].items()}
    return "".join(text for _, text in sorted((files | links).items()))


def unpack(text, root):
    """Makes the files and links below `root`."""
    _, *parts = HEAD.split(text)
    for path, target, content in zip(*[iter(parts)] * 3):
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if target:
            place.symlink_to(target)
        else:
            place.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    source, directory = map(pathlib.Path, sys.argv[1:])
    unpack(source.read_text(encoding="utf-8"), directory)
