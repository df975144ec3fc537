"""Damaged and hostile versions of a valid file: bytes that flip, and edits of what the kind of file is made of."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

_NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64, 10**30, 1e308, -0.5)
_KEYS = ("", "..", "../../x", "/etc/passwd", "nul", "a:b", "\x00", "\x1b[2J\x1b]0;x\x07", "k" * 100_000, "\ud800", "\u202e",
         "٣", "blocks.1000000000.x", "encoder.block.99999.layer.0.x", "__class__", "__metadata__", "weight_map", "layers")
_PICKLES = (b"cos\nsystem\n(S'touch ran_code'\ntR.", b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
            b"(lp0\n" * 1000 + b".", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
            b"\x80\x02ctorch\n_utils\n.", b"\x80\x02" + b"(" * 100_000 + b".", b"\x80\x02]" + b"q\x00h\x00a" * 1000 + b".",
            b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00aX\x01\x00\x00\x00bu.",
            b"\x80\x02I" + b"9" * 100_000 + b"\n.")
_TOML = ("= [[[[", '= "' + "x" * 10_000 + '"', "= " + "9" * 5000, "= nan", "= inf", "= -1", "= 1e400", "= true", "= []",
         '= ["a"]', "= {a = {b = {c = 1}}}", '= "\\u0000"', "= 1979-05-27", "= 18446744073709551616", '= ""', "= " + "[" * 2000,
         '= "/dev/zero"', '= "\\u001b[2J"')
_YAML = (b"2001-99-99", b"!!python/object/apply:os.system ['touch ran_code']", b"[" * 500, b"{a: b", b"&a [*a]", b"0x",
         b"1e9999", b"&a [x, x]\n  b: &b [*a, *a, *a, *a]\n  base_path: &c [*b, *b, *b, *b]", b"|", b"? [a]", b"~",
         b"!!binary x", b"*a")
_LINES = ("", "\x00", "\ufeff", "0: 1" * 100, "9" * 5000 + ": 1", "[" * 5000, "nan " * 10, "1e999 " * 10, "../../x", "{" * 5000,
          "a" * 100_000, "\x1b[2J", "-1", "(" * 500, ")" * 500, "(a:nan)", "٣: 1", "\u2028")
# files of other kinds
_OTHERS = (b"", b"<!DOCTYPE html>", b"{}", b"\x89PNG\r\n\x1a\n", b"PK\x05\x06" + b"\0" * 18, b"\xff\xfe[\0]\0",
           pickle.dumps({"state_dict": {}}, 2), struct.pack("<Q", 2) + b"{}", b"%!PS-Adobe-3.0\n", b"GGUF" + b"\0" * 20,
           b"SQLite format 3\0")


def mutated(content: bytes, kind: str, chance: random.Random) -> bytes:
    """One damaged version.

    Args:
        content: of the valid file.
        kind: its ending, which chooses the edits beside those of bytes.
        chance: the only randomness.
    """
    if chance.random() < 0.03:
        return chance.choice((*_OTHERS, b"\0" * len(content), content * 2))
    edits = _EDITS.get(kind, ())
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        edit = chance.choice(edits) if edits and chance.random() < 0.7 else chance.choice(_OF_BYTES)
        try:
            content = edit(content, chance)
        except Exception:  # the edit before it left nothing that this one could take apart
            content = _flip(content, chance)
    return content


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    # a header is small beside the numbers, and more depends on it
    last = len(changed) if chance.random() < 0.5 else min(len(changed), 4096)
    for _ in range(chance.choice((1, 1, 4, 32))):
        changed[chance.randrange(last)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[:chance.randrange(len(content) + 1)]


def _cut_out(content: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + content[last:]


def _splice(content: bytes, chance: random.Random) -> bytes:
    place, source, count = chance.randrange(len(content)), chance.randrange(len(content)), chance.choice((1, 8, 100, 4096))
    return content[:place] + content[source:source + count] + content[place + chance.choice((0, count)):]


def _number(content: bytes, chance: random.Random) -> bytes:
    """Another number where four or eight bytes stand, often at the beginning, where lengths are."""
    place = chance.choice((0, 4, 8, chance.randrange(min(len(content), 256)), chance.randrange(len(content))))
    form, most = chance.choice((("<I", 2**32), (">I", 2**32), ("<Q", 2**64), (">Q", 2**64), ("<H", 2**16)))
    number = chance.choice((0, 1, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)) % most
    written = struct.pack(form, number)
    return content[:place] + written + content[place + len(written):]


def _junk(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content) + 1)
    return content[:place] + chance.randbytes(chance.choice((1, 7, 512))) + content[place:]


_OF_BYTES = (_flip, _flip, _cut, _cut_out, _splice, _number, _junk)


def _value(chance: random.Random) -> Any:
    kind = chance.randrange(9)
    if kind == 0:
        return chance.choice(_NUMBERS)
    if kind == 1:
        return chance.choice(_KEYS)
    nested: Any = 0
    for _ in range(200 if kind == 2 else 0):
        nested = [nested] if chance.random() < 0.5 else {"a": nested}
    return (None, True, nested, [], {}, float("nan"), [0] * 10_000, {"a": 1}, [[1]])[kind]


def edited_json(value: Any, chance: random.Random) -> Any:
    """Something in a JSON value replaced, left out, doubled, or given another key."""
    places = list(_places(value))
    if not places or chance.random() < 0.05:
        return _value(chance)
    group, key = chance.choice(places)
    action = chance.randrange(5)
    if action == 0:
        del group[key]
    elif action == 1 and isinstance(group, dict):
        group[chance.choice(_KEYS)] = group.pop(key)
    elif action == 2 and isinstance(group, dict):
        group[chance.choice(_KEYS)] = _value(chance)
    elif action == 3:
        other, place = chance.choice(places)
        group[key] = other[place] if not isinstance(other[place], dict | list) else _value(chance)
    else:
        group[key] = _value(chance)
    return value


def _places(value: Any):
    waiting = [value]
    while waiting:
        group = waiting.pop()
        for key in list(group) if isinstance(group, dict) else range(len(group)) if isinstance(group, list) else ():
            yield group, key
            waiting.append(group[key])


def _json(content: bytes, chance: random.Random) -> bytes:
    value = json.loads(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        value = edited_json(value, chance)
    text = json.dumps(value)
    if chance.random() < 0.1:
        text = chance.choice(("[" * 100_000, '{"a":' * 50_000, text * 2, "9" * 10_000, '{"steps": ' + "9" * 5000 + "}"))
    return text.encode("utf-8", "surrogatepass")


def _lines(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """One line changed, left out, or doubled."""
    def edit(content: bytes, chance: random.Random) -> bytes:
        lines = content.split(b"\n")
        place = chance.randrange(len(lines))
        changed = chance.choice(([], [lines[place]] * 2, [change(lines[place], chance)], [change(lines[place], chance)]))
        return b"\n".join([*lines[:place], *changed, *lines[place + 1:]])

    return edit


def _text(line: bytes, chance: random.Random) -> bytes:
    hostile = chance.choice((*_LINES, "\ud800")).encode("utf-8", "surrogatepass")
    return chance.choice((hostile, line + hostile, hostile + line, re.sub(rb"\d+", b"9" * 400, line), b"\xff\xfe" + line))


def _toml(line: bytes, chance: random.Random) -> bytes:
    if b"=" not in line:
        return chance.choice((b"[" + chance.choice(_KEYS).encode("utf-8", "replace") + b"]", b"[[a]]", line * 3))
    key, hostile = line.partition(b"=")[0], chance.choice(_TOML).encode()
    return chance.choice((key + hostile, key + hostile, b".a" * 200 + line, key.strip() + b".a " + hostile))


def _yaml(line: bytes, chance: random.Random) -> bytes:
    return line.partition(b":")[0] + b": " + chance.choice(_YAML)


def _safetensors(content: bytes, chance: random.Random) -> bytes:
    """An edit of the header, or of the JSON that stands as text in its metadata."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    metadata = header.get("__metadata__", {})
    inner = [key for key, text in metadata.items() if text[:1] in "{["]
    if inner and chance.random() < 0.5:
        key = chance.choice(inner)
        metadata[key] = _json(metadata[key].encode(), chance).decode("utf-8", "surrogatepass")
    else:
        header = _header(header, chance)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size:]


def _header(header: dict[str, Any], chance: random.Random) -> Any:
    names = [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    action = chance.randrange(6)
    if action == 0:
        header[name]["dtype"] = chance.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X"))
    elif action == 1:
        header[name]["shape"] = chance.choice(([], [0], header[name]["shape"][::-1], [2**40, 2**40], [-1], [1] * 60,
                                               header[name]["shape"] + [1]))
    elif action == 2:
        header[name]["data_offsets"] = chance.choice(([0, 0], [0, 2**40], [8, 4], header[chance.choice(names)]["data_offsets"]))
    elif action == 3:
        header[chance.choice((*_KEYS, re.sub(r"\d+", "4000000000", name), name + ".x"))] = header.pop(name)
    elif action == 4:
        header[name], header[names[0]] = header[names[0]], header[name]
    else:
        return edited_json(header, chance)
    return header


def _zip(content: bytes, chance: random.Random) -> bytes:
    """The archive of a PyTorch file written anew: compressed, with other names, or with another pickle in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = [(info.filename, archive.read(info)) for info in archive.infolist()]
    action, packed = chance.randrange(5), zipfile.ZIP_STORED
    place = chance.randrange(len(files))
    if action == 0:
        packed = zipfile.ZIP_DEFLATED
    elif action == 1:
        files[place] = (chance.choice(("../x", "a" * 5000, "archive/data.pkl", "é")), files[place][1])
    elif action == 2:
        files = files[:place] + files[place + 1:]
    else:
        files = [(name, _pickle(data, chance) if name.endswith("data.pkl") else data) for name, data in files]
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", packed) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return written.getvalue()


def _pickle(content: bytes, chance: random.Random) -> bytes:
    action = chance.randrange(4)
    if action == 0:
        return chance.choice(_PICKLES)
    if action == 1:
        return pickle.dumps(_value(chance), protocol=2)
    if action == 2:  # another name in place of one that torch needs
        others = (b"cos\nsystem\n", b"cbuiltins\nexec\n")
        return re.sub(rb"c[\w.]+\n\w+\n", lambda found: chance.choice((found[0], *others)), content)
    return chance.choice(_OF_BYTES)(content, chance)


def _png(content: bytes, chance: random.Random) -> bytes:
    """Other sizes, or another chunk, with the right checksum, so that it is believed."""
    at = content.index(b"IHDR")
    sizes = [chance.choice((0, 1, 7, 20_000, 65_535, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
    header = bytearray(content[at + 4:at + 17])
    struct.pack_into(">II", header, 0, *sizes)
    header[8:10] = bytes((chance.choice((1, 2, 4, 8, 16)), chance.choice((0, 2, 3, 4, 6))))
    if chance.random() < 0.5:
        return content[:at] + _chunk(b"IHDR", bytes(header))[4:] + content[at + 21:]
    chunk = chance.choice((_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"\0" * 10_000_000)), _chunk(b"eXIf", chance.randbytes(60)),
                           _chunk(b"tEXt", b"workflow\0" + b"[" * 1_000_000), _chunk(b"zTXt", b"x\0\0" + chance.randbytes(50)),
                           _chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(b"\0" * 10_000_000)), _chunk(b"acTL", b"\xff" * 8),
                           _chunk(b"PLTE", b"\1\2"), _chunk(b"tRNS", b""), _chunk(b"IDAT", zlib.compress(b"\0" * 1_000_000))))
    return content[:at + 21] + chunk + content[at + 21:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tar(content: bytes, chance: random.Random) -> bytes:
    """A member with another size or kind and the right checksum, or a chain of headers of long names."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        at = chance.choice(tar.getmembers()).offset
    header = bytearray(content[at:at + 512])
    action = chance.randrange(4)
    if action == 0:
        sizes = (b"77777777777\0", b"\x80" + b"\xff" * 11, b"-1".ljust(12, b"\0"), b"\0" * 12, b"z" * 12)
        header[124:136] = chance.choice(sizes)
    elif action == 1:
        header[156:157] = chance.choice(b"1 2 3 4 5 6 L K x g S V".split())
    elif action == 2:
        header[:100] = chance.choice((b"../../x.png", b"\xff\xfe.png", b"a." * 49, b".png", b"")).ljust(100, b"\0")
    else:
        long = tarfile.TarInfo("././@LongLink")
        long.type, long.size = b"L", chance.choice((0, 1, 2**30))
        return content[:at] + long.tobuf(tarfile.GNU_FORMAT) * chance.choice((1, 3000)) + content[at:]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512:]


_EDITS: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    ".safetensors": (_safetensors,), ".json": (_json,), ".jsonl": (_lines(_json), _lines(_text)), ".toml": (_lines(_toml),),
    ".txt": (_lines(_text),), ".yaml": (_lines(_yaml), _lines(_text)), ".pt": (_zip,),
    ".ckpt": (_zip,), ".bin": (_pickle,), ".png": (_png,), ".tar": (_tar,),
}
