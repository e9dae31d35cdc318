"""Files that are cut, exchanged, or something else."""

import torch
from safetensors.torch import load_file

from tests.deployment.damages.checkpoints import HEAD, INDEX, SHARDS, WEIGHTS, Damage, edit_tensors, split, write


def cut(file, length):
    def apply(folder):
        content = (folder / file).read_bytes()
        header = 8 + len(split(folder / file)[0])
        write(folder / file, content[: length(len(content), header)])

    return apply


def truncations():
    lengths = {f"{n} bytes": lambda size, header, n=n: n for n in (0, 1, 7, 8, 9, 100)}
    lengths |= {f"{k}/8 of the header": lambda size, header, k=k: 8 + (header - 8) * k // 8 for k in range(1, 8)}
    lengths |= {f"the header {n:+} bytes": lambda size, header, n=n: header + n for n in (-1, 0, 1, 4096)}
    lengths |= {f"{k}/8 of the data": lambda size, header, k=k: header + (size - header) * k // 8 for k in range(1, 8)}
    lengths |= {f"all but {n} bytes": lambda size, header, n=n: size - n for n in (1, 4, 4096)}
    for name, length in lengths.items():
        yield Damage(f"cut to {name}", "bert", cut(WEIGHTS, length), rf"/{WEIGHTS} cannot be read")
    for shard in SHARDS:
        for name in ("0 bytes", "4/8 of the header", "all but 1 bytes"):
            yield Damage(f"{shard} cut to {name}", "llama", cut(shard, lengths[name]), rf"/{shard} cannot be read")


def exchange(first, second):
    def apply(folder):
        contents = (folder / first).read_bytes(), (folder / second).read_bytes()
        write(folder / first, contents[1])
        write(folder / second, contents[0])

    return apply


def replace(file, source):
    """Put ``source``, relative to the checkpoint, in the place of a file."""
    return lambda folder: write(folder / file, (folder / source).read_bytes())


def append(file, content):
    return lambda folder: write(folder / file, (folder / file).read_bytes() + content)


def remove(file):
    return lambda folder: (folder / file).unlink()


def make_directory(file):
    def apply(folder):
        (folder / file).unlink()
        (folder / file).mkdir()

    return apply


def pickled(file, name):
    def apply(folder):
        tensors = load_file(folder / file)
        (folder / file).unlink()
        torch.save(tensors, folder / name)

    return apply


def with_tensor(file, name):
    return lambda folder: edit_tensors(folder / file, lambda tensors: tensors.update({name: torch.ones(2)}))


def exchanged_shards():
    for number, first in enumerate(SHARDS):
        for second in SHARDS[number + 1 :]:
            yield Damage(f"{first} and {second} exchanged", "llama", exchange(first, second), f"/{INDEX} does not say")
    for shard, following in zip(SHARDS, [*SHARDS[1:], SHARDS[0]], strict=True):
        foreign = replace(shard, f"../other/{shard}")
        yield Damage(f"{shard} of another model", "llama", foreign, "files in .*llama are from different checkpoints")
        yield Damage(f"{shard} twice", "llama", replace(following, shard), f"/{following}.* both hold")
        yield Damage(f"no {shard}", "llama", remove(shard), f"/{shard} cannot be read")
        yield Damage(f"{shard} is a directory", "llama", make_directory(shard), f"/{shard} cannot be read")
        yield Damage(f"{shard} is a pickle", "llama", pickled(shard, shard), f"/{shard} cannot be read")
        yield Damage(f"{shard} with a byte more", "llama", append(shard, b"\0"), f"/{shard} cannot be read")
        yield Damage(f"{shard} with a tensor more", "llama", with_tensor(shard, "new"), r"unknown \['new'\]")
        message = rf"both hold {HEAD}" if shard != SHARDS[2] else rf"not what was saved: \['{HEAD}'\]"
        yield Damage(f"{shard} with another head", "llama", with_tensor(shard, HEAD), message)


def exchanged_files():
    yield Damage("no index", "llama", remove(INDEX), f"no file named {WEIGHTS}")
    yield Damage("no weights", "bert", remove(WEIGHTS), f"no file named {WEIGHTS}")
    yield Damage("weights are a directory", "bert", make_directory(WEIGHTS), f"no file named {WEIGHTS}")
    yield Damage("weights are JSON", "bert", replace(WEIGHTS, "config.json"), f"/{WEIGHTS} cannot be read")
    yield Damage("weights are a pickle", "bert", pickled(WEIGHTS, WEIGHTS), f"/{WEIGHTS} cannot be read")
    yield Damage("weights with a byte more", "bert", append(WEIGHTS, b"\0"), f"/{WEIGHTS} cannot be read")
    foreign = replace(WEIGHTS, f"../other/{SHARDS[0]}")
    yield Damage("weights of another model", "bert", foreign, "does not hold the tensors that were saved")
    other_file = "pytorch_model.bin"
    yield Damage(
        f"only {other_file}", "bert", pickled(WEIGHTS, other_file), f"/{other_file} is not a safetensors file"
    )
