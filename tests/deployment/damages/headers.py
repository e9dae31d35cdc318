"""Headers of safetensors files: hostile ones, flipped bits, and digests that were tampered with."""

import base64
import json
import pickle
import random
import re
import struct

from peft_jactus.deployment.integrity import METADATA_KEY, NOT_COMPUTED
from tests.deployment.damages.checkpoints import (
    A_PART,
    SHARDS,
    WEIGHTS,
    Damage,
    edit_header,
    join,
    split,
    tensors_of,
    write,
)

UNREADABLE = f"/{WEIGHTS} cannot be read"


def hostile_lengths():
    def declare(size):
        def apply(folder):
            header, data = split(folder / WEIGHTS)
            write(folder / WEIGHTS, struct.pack("<Q", size(len(header))) + header + data)

        return apply

    for size in (0, 1, 10**8 + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1):
        yield Damage(f"header said to have {size} bytes", "bert", declare(lambda _, n=size: n), UNREADABLE)
    for more in (-8, -1, 1, 8, 1000):
        yield Damage(f"header said to have {more:+} bytes", "bert", declare(lambda n, k=more: n + k), UNREADABLE)


def hostile_texts():
    def edit(change):
        return lambda folder: join(folder / WEIGHTS, change(split(folder / WEIGHTS)[0]), split(folder / WEIGHTS)[1])

    changes = {
        "is empty": lambda header: b"",
        "is []": lambda header: b"[]",
        "is null": lambda header: b"null",
        "is a number": lambda header: b"1e999",
        "is not UTF-8": lambda header: header.replace(b"embeddings", b"embedding\xff"),
        "has a zero byte": lambda header: header.replace(b"embeddings", b"embedding\0"),
        "is not closed": lambda header: header.rstrip()[:-1],
        "is two objects": lambda header: header + b"{}",
        "is nested objects": lambda header: b'{"a":' * 100_000 + b"{}" + b"}" * 100_000,
        "is nested lists": lambda header: b"[" * 1_000_000,
        "starts with a byte order mark": lambda header: b"\xef\xbb\xbf" + header,
        "is a pickle": pickle.dumps,
        "is base64": base64.b64encode,
    }
    for name, change in changes.items():
        yield Damage(f"header {name}", "bert", edit(change), UNREADABLE)
    yield Damage("no tensors", "bert", lambda folder: write(folder / WEIGHTS, bytes(8)), UNREADABLE)
    yield Damage("{} as header", "bert", lambda folder: join(folder / WEIGHTS, b"{}", b""), "carries no digests")


def edit_entry(change):
    return lambda folder: edit_header(folder / WEIGHTS, lambda header: change(header[A_PART["bert"]]))


def hostile_entries():
    changes = {
        "offsets reversed": lambda e: e["data_offsets"].reverse(),
        "offsets negative": lambda e: e.update(data_offsets=[-4, 0]),
        "offsets beyond the end": lambda e: e.update(data_offsets=[2**40, 2**40 + 4]),
        "offsets of 64 bits": lambda e: e.update(data_offsets=[2**64 - 4, 2**64 - 1]),
        "offsets that overlap": lambda e: e.update(data_offsets=[v - 4 for v in e["data_offsets"]]),
        "three offsets": lambda e: e["data_offsets"].append(0),
        "floating offsets": lambda e: e.update(data_offsets=[float(v) for v in e["data_offsets"]]),
        "no offsets": lambda e: e.pop("data_offsets"),
        "no shape": lambda e: e.pop("shape"),
        "no dtype": lambda e: e.pop("dtype"),
        "a shape that overflows": lambda e: e.update(shape=[2**33, 2**33]),
        "a shape of 65 bits": lambda e: e.update(shape=[2**64]),
        "a negative shape": lambda e: e.update(shape=[-v for v in e["shape"]]),
        "a shape of strings": lambda e: e.update(shape=[str(v) for v in e["shape"]]),
        "a nested shape": lambda e: e.update(shape=[e["shape"]]),
        "a larger shape": lambda e: e.update(shape=[v + 1 for v in e["shape"]]),
        "an unknown dtype": lambda e: e.update(dtype="F33"),
        "dtype null": lambda e: e.update(dtype=None),
        "dtype 32": lambda e: e.update(dtype=32),
        "a larger dtype": lambda e: e.update(dtype="F64"),
    }
    for name, change in changes.items():
        yield Damage(f"header with {name}", "bert", edit_entry(change), UNREADABLE)
    for name, metadata in (("numbers", {"a": 1}), ("a list", ["a"]), ("a string", "a")):
        apply = edit_metadata(lambda h, m=metadata: h.update(__metadata__=m))
        yield Damage(f"header with metadata of {name}", "bert", apply, UNREADABLE)


def relabelled_entries():
    """The same bytes under another description."""
    changes = {
        "transposed": lambda e: e["shape"].reverse(),
        "flat": lambda e: e.update(shape=[e["shape"][0] * e["shape"][1]]),
        "of 3 dimensions": lambda e: e.update(shape=[1, *e["shape"]]),
        "int32": lambda e: e.update(dtype="I32"),
        "uint32": lambda e: e.update(dtype="U32"),
        "complex64": lambda e: e.update(dtype="C64", shape=[e["shape"][0], e["shape"][1] // 2]),
    }
    bytes_per_number = {"BF16": 2, "F16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F4": 0.5}
    for dtype, size in bytes_per_number.items():
        rows = int(4 / size)
        changes[dtype] = lambda e, d=dtype, r=rows: e.update(dtype=d, shape=[r * e["shape"][0], e["shape"][1]])
    message = rf"not what was saved: \['{re.escape(A_PART['bert'])}'\]|{UNREADABLE}"
    for name, change in changes.items():
        yield Damage(f"header that says {name}", "bert", edit_entry(change), message)


def flipped_header_bits():
    def flip(position, bit):
        def apply(folder):
            header, data = split(folder / WEIGHTS)
            # Behind the metadata, of which not all is compared without `verify`.
            start, end = header.index(b'"bert.', header.index(b'"}')), len(header.rstrip())
            header = bytearray(header)
            header[start + int((end - start) * position)] ^= 1 << bit
            join(folder / WEIGHTS, bytes(header), data)

        return apply

    generator = random.Random(0)
    for number in range(40):
        position, bit = generator.random(), generator.randrange(8)
        message = f"{UNREADABLE}|does not hold the tensors that were saved|are not what was saved"
        yield Damage(f"header bit {bit} at {position:.4f} flipped ({number})", "bert", flip(position, bit), message)


# -- digests ----------------------------------------------------------------------------------------------


def edit_metadata(change, *files):
    """Change the header of each file."""

    def apply(folder):
        for file in files or (WEIGHTS,):
            edit_header(folder / file, change)

    return apply


def edit_digests(change):
    def apply(header):
        digests = json.loads(header["__metadata__"][METADATA_KEY])
        change(digests)
        header["__metadata__"][METADATA_KEY] = json.dumps(digests)

    return edit_metadata(apply)


def broken_digests():
    def set_digests(text):
        return edit_metadata(lambda header: header["__metadata__"].update({METADATA_KEY: text}))

    def drop_digests(header):
        del header["__metadata__"][METADATA_KEY]

    no_digests = f"/{WEIGHTS} carries no digests"
    for text in (
        "",
        "null",
        "[]",
        "4",
        "{",
        '"x"',
        "NaN",
        '{"a": 1}',
        '{"a": ["b"]}',
        "[" * 100_000,
        '{"a":' * 100_000,
    ):
        yield Damage(f"digests {text[:12]!r}", "bert", set_digests(text), no_digests)
    yield Damage("digests {}", "bert", set_digests("{}"), "does not hold the tensors that were saved")
    yield Damage("digests not computed", "bert", set_digests(NOT_COMPUTED), "carries no digests", verify=True)
    yield Damage("no metadata", "bert", edit_metadata(lambda header: header.pop("__metadata__")), no_digests)
    yield Damage("no digests", "bert", edit_metadata(drop_digests), no_digests)
    for shard in SHARDS:
        message = "files in .*llama are from different checkpoints"
        yield Damage(f"no digests in {shard}", "llama", edit_metadata(drop_digests, shard), message)
    yield Damage("no digests in any shard", "llama", edit_metadata(drop_digests, *SHARDS), "carries no digests")


def edited_digests():
    name, other = list(tensors_of("bert"))[:2]
    at = re.escape(name)
    differs = rf"not what was saved: \['{at}'\]"
    changes = {
        "one missing": (lambda d: d.pop(name), rf"unknown \['{at}'\]"),
        "one too many": (lambda d: d.update({"new": ["0", "0"]}), r"missing \['new'\]"),
        "one empty": (lambda d: d.update({name: ["", ""]}), differs),
        "one of numbers": (lambda d: d.update({name: [0, 0]}), differs),
        "one of another tensor": (lambda d: d.update({name: d[other]}), differs),
        "one of half its length": (lambda d: d.update({name: [d[name][0][:8], d[name][1]]}), differs),
        "one null": (lambda d: d.update({name: None}), "carries no digests"),
        "one of three parts": (lambda d: d[name].append(""), "carries no digests"),
        "two exchanged": (lambda d: d.update({name: d[other], other: d[name]}), "2 tensors .* are not what was saved"),
    }
    for what, (change, message) in changes.items():
        yield Damage(f"digests, {what}", "bert", edit_digests(change), message)
    change = lambda d: d.update({name: [d[name][0], "0" * 64]})  # noqa: E731
    yield Damage("digests, one of all bytes wrong", "bert", edit_digests(change), differs, verify=True)
