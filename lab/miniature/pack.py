"""`python -m lab.miniature.pack sources|split|join ...`: what travels to another machine and back.

`sources --packages NODE_MODULES --out FILE.tar.xz` keeps of the npm packages what the data set is made of: a node_modules
folder again once unpacked. `split --folder DIR --out DIR` makes parts of at most 15 MiB, `join --parts DIR --out DIR` a folder.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

from ..emoji.icons import DATASOURCE
from .concepts import plain_codepoints, select_concepts
from .dataset import USUAL_NAMES_FROM, forms
from .icons import IconSet, codepoints_by_name, read_json
from .styles import LEARNT, UNSEEN

PART_BYTES = 15 << 20
_PART = "part-{:02d}"
_ENTRY_KEYS = ("name", "unified", "short_name", "short_names", "category", "subcategory", "skin_variations")


def slim_packages(packages: Path) -> dict[str, bytes]:
    """Path in a node_modules folder -> content, with the drawings that the data set uses."""
    datasource = read_json(packages, f"{DATASOURCE}/emoji.json")
    by_name = codepoints_by_name(packages, datasource)
    chars = read_json(packages, f"@iconify-json/{USUAL_NAMES_FROM}/chars.json")
    concepts = select_concepts(datasource, {plain_codepoints(key): name for key, name in chars.items()})
    wanted = {codepoints for concept in concepts for _, codepoints in forms(concept)}
    entries = [{key: entry[key] for key in _ENTRY_KEYS if key in entry} for entry in datasource]
    for entry in entries:
        if "skin_variations" in entry:
            entry["skin_variations"] = dict.fromkeys(entry["skin_variations"], 0)
    files = {f"{DATASOURCE}/emoji.json": entries}
    for style in (*LEARNT, *UNSEEN):
        folder, icon_set = f"@iconify-json/{style.package}", IconSet(packages, style, by_name)
        files[f"{folder}/icons.json"] = icon_set.only(wanted)
        files[f"{folder}/chars.json"] = read_json(packages, f"{folder}/chars.json")
        files[f"{folder}/package.json"] = {"version": icon_set.version}
    return {name: json.dumps(content).encode() for name, content in files.items()}


def write_tar(files: dict[str, bytes], path: Path) -> None:
    """xz; files of one kind beside each other, as the tones of one drawing are nearly alike."""
    with tarfile.open(path, "w:xz", preset=6) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def split(folder: Path, out: Path) -> list[Path]:
    """The folder as a tar in parts; float weights do not shrink, so nothing is compressed."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.add(folder, arcname=".")
    content = stream.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        parts.append(out / _PART.format(number))
        parts[-1].write_bytes(content[start:start + PART_BYTES])
    return parts


def join(parts: Path, out: Path) -> None:
    """The folder of `split` again."""
    content = b"".join(path.read_bytes() for path in sorted(parts.glob(_PART.format(0)[:-2] + "*")))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(out, filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source in (("sources", "packages"), ("split", "folder"), ("join", "parts")):
        command = commands.add_parser(name)
        command.add_argument(f"--{source}", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "sources":
        write_tar(slim_packages(options.packages), options.out)
    elif options.command == "split":
        split(options.folder, options.out)
    else:
        join(options.parts, options.out)


if __name__ == "__main__":
    main()
