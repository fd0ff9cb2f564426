"""Strict loading: every way a file can be wrong has its own line; what is written comes back."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from checkpoints import weights
from checkpoints.files import read_json, resolve, write_file
from checkpoints.names import rename, reverse
from config import UserError
from tests.tools.environment import run

TABLE = (("attn.*.kernel", "blocks.*.weight"), ("old.**", "head.**"))


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))
        self.head = nn.Linear(3, 2)
        self.spare, self.spares = ("unused.**",), {}
        self.tied = {"blocks.1.weight": "blocks.0.weight"} if tied else {}


def state():
    torch.manual_seed(0)
    return {
        "attn.0.kernel": torch.randn(3, 3),
        "attn.1.kernel": torch.randn(3, 3),
        "old.weight": torch.randn(2, 3),
        "old.bias": torch.randn(2),
        "unused.a.b": torch.randn(1),
    }


def meta(tied=False):
    with weights.empty():
        return Net(tied)


def test_building_empty_modules_is_cheap():
    script = """
import sys, torch
from checkpoints import weights
from torch import nn
with weights.empty():
    net = nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3), nn.LayerNorm(3), nn.Conv2d(3, 3, 3))
    own = nn.Parameter(nn.init.normal_(torch.empty(3)))
print(all(p.is_meta for p in [own, *net.parameters()]), "sympy" in sys.modules)
print(nn.Linear(3, 3).weight.abs().sum() > 0)  # outside, initialisation is what it was
"""
    done = run("-c", script)
    assert done.stdout.split() == ["True", "False", "tensor(True)"]


def test_rename_goes_both_ways():
    for theirs, ours in (
        ("attn.7.kernel", "blocks.7.weight"),
        ("old.a.b", "head.a.b"),
        ("other", "other"),
    ):
        assert rename(theirs, TABLE) == ours
        assert rename(ours, reverse(TABLE)) == theirs
    assert rename("attn.7.x.kernel", TABLE) == "attn.7.x.kernel"  # `*` is one component


@pytest.mark.parametrize("shard_bytes", [10**9, 40])
def test_round_trip_in_one_file_and_in_shards(tmp_path, shard_bytes):
    weights.save(tmp_path, state(), shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 40)
    source, net = weights.Checkpoint(tmp_path), meta()
    used = weights.load(net, source, TABLE)
    assert used == set(state()) == set(source)
    back = weights.tensors(net, TABLE)
    assert back.keys() == state().keys() and all(
        torch.equal(back[k], v) for k, v in state().items()
    )
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    half = meta()
    weights.load(half, source, TABLE, dtype=torch.bfloat16)
    assert half.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"attn.1.kernel": None},
            "attn.1.kernel: missing from the weights; fix: give the folder of a complete",
        ),
        (
            {"extra": torch.ones(1)},
            "extra: a tensor this model has no place for; fix: check config.json's model_type",
        ),
        (
            {"old.bias": torch.ones(3)},
            "model.safetensors:old.bias: shape [3], the config needs [2]; fix: use the config.json",
        ),
        (
            {"head.bias": torch.ones(2)},
            "old.bias: a second tensor for head.bias; fix: remove one of the two",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    broken = {k: v for k, v in (state() | change).items() if v is not None}
    weights.save(tmp_path, broken)
    untouched(tmp_path, message)


def test_tied_weights(tmp_path):
    one = state()
    one.pop("attn.1.kernel")
    weights.save(tmp_path, one)
    net = meta(tied=True)
    weights.load(net, weights.Checkpoint(tmp_path), TABLE)
    assert net.blocks[1].weight is net.blocks[0].weight
    weights.save(tmp_path, one | {"attn.1.kernel": one["attn.0.kernel"].clone()})  # a copy is fine
    weights.load(meta(tied=True), weights.Checkpoint(tmp_path), TABLE)
    weights.save(tmp_path, state())  # another value is not
    with pytest.raises(UserError, match="to which the config ties it"):
        weights.load(meta(tied=True), weights.Checkpoint(tmp_path), TABLE)


HTML, LFS = (
    b"<!doctype html><html></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
)


def untouched(folder, message, table=TABLE, **options):
    """Loading raises one line with `message`, and leaves the module as it was."""
    net = Net()
    before = {k: (v, v.clone()) for k, v in net.state_dict(keep_vars=True).items()}
    with pytest.raises(UserError) as error:
        weights.load(net, weights.Checkpoint(folder, **options), table)
    assert (
        message in str(error.value)
        and "; fix: " in str(error.value)
        and "\n" not in str(error.value)
    )
    after = net.state_dict(keep_vars=True)
    assert (
        all(after[k] is v and torch.equal(v, copy) for k, (v, copy) in before.items())
        and net.spares == {}
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (
            None,
            "model.safetensors: missing; fix: give a folder with model.safetensors or its shards",
        ),
        (
            "folder",
            "model.safetensors: cannot be read (Is a directory); "
            "fix: give a folder of readable files",
        ),
        (b"", "model.safetensors: an empty file; fix: download it again"),
        (
            HTML,
            "model.safetensors: an HTML page, not a whole safetensors file; "
            "fix: download it again; a gated",
        ),
        (LFS, "model.safetensors: a Git LFS pointer, not the file itself; fix: run git lfs pull"),
        (
            "truncated",
            "model.safetensors: not a whole safetensors file "
            "(Error while deserializing header: incomplete",
        ),
        ("headless", "model.safetensors: not a whole safetensors file ("),
    ],
)
def test_what_is_no_weight_file(tmp_path, content, message):
    file = tmp_path / "model.safetensors"
    save_file(state(), file)
    whole = file.read_bytes()
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes({"truncated": whole[:-5], "headless": whole[:60]}.get(content, content))
    untouched(tmp_path, message)


@pytest.mark.parametrize("content", [None, "folder", b"", HTML, LFS, b"{", b"\xff", b"[]"])
def test_what_is_no_config(tmp_path, content):
    file = tmp_path / "config.json"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    messages = {
        None: "missing",
        "folder": "Is a directory",
        b"": "an empty file",
        HTML: "an HTML page, not JSON",
        LFS: "a Git LFS pointer",
        b"[]": "not a JSON object",
    }
    message = messages.get(content, "not JSON")
    with pytest.raises(UserError, match=f"config.json: .*{message}.*; fix: "):
        read_json(file)
    if content is None:
        assert read_json(file, optional=True) == {}


def header(*entries) -> bytes:
    """A safetensors file of float32 pairs, its header written by hand: (key, offset) may repeat."""
    text = ",".join(
        f'"{k}":{{"dtype":"F32","shape":[2],"data_offsets":[{o},{o + 8}]}}' for k, o in entries
    ).encode()
    return (
        (len(text) + 2).to_bytes(8, "little")
        + b"{"
        + text
        + b"}"
        + bytes(max(o for _, o in entries) + 8)
    )


def test_a_key_twice(tmp_path):
    for second in (0, 8):  # the same bytes again, or others
        (tmp_path / "model.safetensors").write_bytes(header(("old.bias", 0), ("old.bias", second)))
        untouched(tmp_path, "model.safetensors:old.bias: twice in the header; fix: download")
    (tmp_path / "model.safetensors").write_bytes(header(("old.bias", 0), ("other", 8)))
    assert set(weights.Checkpoint(tmp_path)) == {"old.bias", "other"}

    weights.save(tmp_path, state(), 40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    first, last = index["attn.0.kernel"], index["old.weight"]
    save_file(
        {k: state()[k] for k, name in index.items() if name == last or k == "attn.0.kernel"},
        tmp_path / last,
    )
    untouched(tmp_path, f"{last}:attn.0.kernel: also in {first}; fix: download")


def test_an_index_that_lies(tmp_path):
    home, outside = tmp_path / "home", tmp_path / "evil.safetensors"
    weights.save(home, state(), 40)
    index = home / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    key, shard = next(iter(good.items()))
    outside.write_bytes((home / shard).read_bytes())
    (home / "link.safetensors").symlink_to(outside)
    (home / "deep").mkdir()
    (home / "deep/in.safetensors").write_bytes(outside.read_bytes())

    def lie(table, message):
        index.write_text(json.dumps({"weight_map": table}))
        untouched(home, message)

    for name in (
        "../evil.safetensors",
        str(outside),
        str(home / shard),
        "link.safetensors",
        "deep/in.safetensors",
        "..",
    ):
        lie(
            good | {key: name},
            f"index.json:{key}: its shard {name!r} lies outside the folder; fix: download",
        )
    lie(
        good | {key: "gone.safetensors"},
        "home/gone.safetensors: missing; fix: give a folder with model.safetensors",
    )
    lie(good | {"ghost": shard}, "index.json:ghost: index and shards disagree; fix: download")
    lie(
        {k: v for k, v in good.items() if k != key} | {"a": shard},
        ": index and shards disagree; fix: download",
    )
    lie(
        good | {key: good["old.bias"]},
        f"index.json:{key}: index and shards disagree; fix: download",
    )
    swapped = {key: good["attn.1.kernel"], "attn.1.kernel": shard}
    lie(good | swapped, f"index.json:{key}: index and shards disagree; fix: download")
    lie([], "index.json:weight_map: not a table of key and shard; fix: download")
    lie({key: 1}, "index.json:weight_map: not a table of key and shard; fix: download")
    index.write_bytes(HTML)
    untouched(home, "index.json: an HTML page, not JSON; fix: download")


@pytest.mark.parametrize("below", ["", "language_model"])
def test_the_hugging_face_cache_keeps_its_links(tmp_path, below):
    blobs, home = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123" / below
    weights.save(home, state(), 40)
    blobs.mkdir()
    for i, file in enumerate(sorted(home.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    weights.load(meta(), weights.Checkpoint(home), TABLE)
    elsewhere = tmp_path / "blobs"  # another cache's folder of that name is not this one's
    elsewhere.mkdir()
    shard = next(f for f in home.iterdir() if f.suffix == ".safetensors")
    shard.resolve().rename(elsewhere / "0")
    shard.unlink()
    shard.symlink_to(elsewhere / "0")
    untouched(home, f"its shard {shard.name!r} lies outside the folder")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_parameter_takes_plain_floats_only(tmp_path, dtype):
    weights.save(tmp_path, state() | {"old.bias": torch.ones(2).to(dtype)})
    name = str(dtype).removeprefix("torch.")
    untouched(
        tmp_path,
        f"model.safetensors:old.bias: type {name}, the model needs float64 or float32 or float16 "
        "or bfloat16; fix: give the original weights",
    )


def test_an_integer_buffer_takes_its_own_type_only(tmp_path):
    net = nn.Module()
    net.register_buffer("ids", torch.arange(3))
    weights.save(tmp_path, {"ids": torch.tensor([5, 6, 7])})
    weights.load(net, weights.Checkpoint(tmp_path), dtype=torch.bfloat16)
    assert net.ids.tolist() == [5, 6, 7] and net.ids.dtype == torch.int64
    for wrong in (torch.float32, torch.int32):
        weights.save(tmp_path, {"ids": torch.zeros(3, dtype=wrong)})
        with pytest.raises(
            UserError, match="ids: type .*, the model needs int64; fix: give the original weights"
        ):
            weights.load(net, weights.Checkpoint(tmp_path))
    assert net.ids.tolist() == [5, 6, 7]


# A file may keep several parameters as one tensor.
FUSED = (
    ("l.*.qkv.kernel", ("l.*.q.weight", "l.*.k.weight", "l.*.v.weight")),
    ("last.**", "norm.**"),
)


def fused_net(rows=(4, 2, 2)):
    net = nn.Module()
    with weights.empty():
        net.l = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in net.l:
            for name, n in zip("qkv", rows, strict=True):
                setattr(layer, name, nn.Linear(3, n, bias=False))
        net.norm = nn.LayerNorm(3)
    return net


def fused_state():
    torch.manual_seed(1)
    return {
        "p.l.0.qkv.kernel": torch.randn(8, 3),
        "p.l.1.qkv.kernel": torch.randn(8, 3),
        "p.last.weight": torch.randn(3),
        "p.last.bias": torch.randn(3),
    }


def test_a_fused_tensor_is_split_and_comes_back(tmp_path):
    assert rename("l.7.qkv.kernel", FUSED) == (
        "l.7.q.weight",
        "l.7.k.weight",
        "l.7.v.weight",
    )
    for name in "qkv":
        assert rename(f"l.7.{name}.weight", reverse(FUSED)) == "l.7.qkv.kernel"
    state = fused_state()
    weights.save(tmp_path, state)
    for dtype in (None, torch.bfloat16):
        net = fused_net()
        weights.load(net, weights.Checkpoint(tmp_path), FUSED, "p.", dtype)
        whole = state["p.l.1.qkv.kernel"].to(dtype or torch.float32)
        assert torch.equal(net.l[1].q.weight, whole[:4])
        assert torch.equal(net.l[1].k.weight, whole[4:6])
        assert torch.equal(net.l[1].v.weight, whole[6:])
        back = weights.tensors(net, FUSED, "p.")
        assert back.keys() == state.keys()
        assert all(
            torch.equal(back[k], v.to(back[k].dtype)) and not back[k].requires_grad
            for k, v in state.items()
        )
    weights.save(
        tmp_path / "ours", weights.tensors(net)
    )  # views of one tensor can be written under our own names
    assert set(weights.Checkpoint(tmp_path / "ours")) == set(net.state_dict())


def test_a_fused_tensor_that_does_not_fit(tmp_path):
    def fails(net, message):
        with pytest.raises(UserError, match=message):
            weights.load(net, weights.Checkpoint(tmp_path), FUSED, "p.")
        assert all(p.is_meta for p in net.parameters())

    weights.save(tmp_path, fused_state())
    fails(
        fused_net((4, 2, 3)),
        r"model.safetensors:p.l.0.qkv.kernel: shape \[8, 3\], the config needs \[9, 3\]",
    )
    net = fused_net()
    del net.l[0].k
    fails(net, "p.l.0.qkv.kernel: a tensor this model has no place for")
    weights.save(tmp_path, fused_state() | {"p.l.1.k.weight": torch.ones(2, 3)})
    fails(fused_net(), "p.l.1.qkv.kernel: a second tensor for l.1.k.weight")
    weights.save(tmp_path, {k: v for k, v in fused_state().items() if k != "p.l.1.qkv.kernel"})
    fails(fused_net(), f"{tmp_path.name}:p.l.1.qkv.kernel: missing from the weights and 2 more")


def pickled(folder, sharded):
    parts = (
        [dict(list(state().items())[:2]), dict(list(state().items())[2:])] if sharded else [state()]
    )
    names = (
        [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        if sharded
        else ["pytorch_model.bin"]
    )
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    if sharded:
        table = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_only_when_asked_for(tmp_path, sharded):
    pickled(tmp_path, sharded)
    untouched(
        tmp_path,
        "pytorch_model.bin: only pickled weights; "
        "fix: pass allow_pickle=true, or convert to safeten",
    )
    net = meta()
    weights.load(net, weights.Checkpoint(tmp_path, allow_pickle=True), TABLE)
    back = weights.tensors(net, TABLE)
    assert back.keys() == state().keys() and all(
        torch.equal(back[k], v) for k, v in state().items()
    )
    weights.save(tmp_path, {"other": torch.ones(1)})  # safetensors come first
    assert set(weights.Checkpoint(tmp_path, allow_pickle=True)) == {"other"}


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a checkpoint was run')",)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "an empty file"),
        (HTML, "an HTML page, not a whole bin file"),
        (LFS, "a Git LFS pointer"),
        ("truncated", "not a whole bin file ("),
        ({"a": Bomb()}, "not a whole bin file (Weights only load failed"),
        (
            {"state_dict": {"a": torch.ones(1)}},
            "not a table of names and tensors; fix: convert it to safetensors",
        ),
    ],
)
def test_a_bad_pickle(tmp_path, content, message):
    file = tmp_path / "pytorch_model.bin"
    if isinstance(content, dict):
        torch.save(content, file)
    elif content == "truncated":
        torch.save(state(), file)
        file.write_bytes(file.read_bytes()[:-50])
    else:
        file.write_bytes(content)
    untouched(tmp_path, f"pytorch_model.bin: {message}", allow_pickle=True)


def test_an_old_pickle_without_zip(tmp_path):
    torch.save(state(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    weights.load(meta(), weights.Checkpoint(tmp_path, allow_pickle=True), TABLE)


def test_checkpoints_joined_under_prefixes(tmp_path):
    llm, tower = tmp_path / "language_model", tmp_path / "vision_tower"
    weights.save(llm, state())
    weights.save(tower, {"weight": torch.ones(2, 3), "bias": torch.ones(3)})
    parts = {"llm.": weights.Checkpoint(llm), "tower.": weights.Checkpoint(tower)}
    joined = weights.Joined(parts)
    assert (
        set(joined) == {f"llm.{k}" for k in state()} | {"tower.weight", "tower.bias"}
        and len(joined) == 7
    )
    net = meta()
    assert weights.load(net, joined, TABLE, prefix="llm.") == {f"llm.{k}" for k in state()}
    assert torch.equal(net.head.weight, state()["old.weight"])
    assert joined.file("tower.bias") == tower / "model.safetensors"
    with weights.empty():
        wrong, deeper = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UserError, match="vision_tower/model.safetensors:bias: shape"):
        weights.load(wrong, joined, prefix="tower.")
    with pytest.raises(UserError, match="vision_tower:0.bias: missing from the weights"):
        weights.load(deeper, joined, prefix="tower.", ignore=("weight", "bias"))
    nested = weights.Joined({"": parts["llm."], "unused.": parts["tower."]})
    assert (
        nested.file("unused.a.b") == llm / "model.safetensors"
        and nested.file("unused.bias").parent == tower
    )
    with pytest.raises(
        UserError, match="vision_tower/model.safetensors:weight: also in .*language_model"
    ):
        weights.save(llm, {"a.weight": torch.ones(1)})
        weights.Joined({"": weights.Checkpoint(llm), "a.": parts["tower."]})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    write_file(file, "old")

    def fail(path):
        open(path, "w").write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(file, fail)
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        write_file(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    """A pipe, a device, a folder, links to themselves and to nowhere in the place of a file."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    ways = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path),
        "nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
    }
    for name in names:
        for way, make in ways.items():
            folder = tmp_path / f"{name}-{way}"
            folder.mkdir()
            make(folder / name)
            with pytest.raises(UserError, match="fix: "):
                weights.Checkpoint(folder, allow_pickle=True)
            with pytest.raises(UserError, match="fix: "):
                weights.read_file(folder / name)
            with pytest.raises(UserError, match="fix: "):
                read_json(folder / name)


def test_an_index_with_a_shard_that_cannot_be(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    for shard in ("a", "", ".", "..", "\0", "\ud83d", "x" * 5000, "../a", "/etc/hostname"):
        index = json.dumps({"weight_map": {"key": shard}})
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match="fix: "):
            weights.Checkpoint(tmp_path)


def test_a_pickle_of_tensors_that_cannot_be_used(tmp_path):
    sparse = torch.eye(3).to_sparse()
    meta = torch.empty(3, device="meta")
    for content in ({"a": sparse}, {"a": meta}, {3: torch.ones(2)}, [torch.ones(2)]):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match="fix: "):
            weights.Checkpoint(tmp_path, allow_pickle=True)


def test_names(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("", "./nowhere", "a/b/c", "no-such-org/no-such-model"):
        with pytest.raises(UserError, match="fix: "):
            resolve(name)


def test_pickled_weights_are_downloaded_only_when_asked_for(tmp_path, monkeypatch):
    """A stand-in for the hub: `cache` is what is on the disk, `hub` what could be downloaded."""
    import huggingface_hub

    cache, hub = tmp_path / "cache", set()

    def snapshot_download(name, allow_patterns, local_files_only):
        if not local_files_only:
            if not hub:
                raise OSError("no network")
            cache.mkdir(exist_ok=True)
            for file in hub:
                if any(Path(file).match(pattern) for pattern in allow_patterns):
                    (cache / file).touch()
        elif not cache.exists():
            raise OSError("not cached")
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.update({"config.json", "pytorch_model.bin", "training_args.bin"})
    for allow, there in ((False, {"config.json"}), (True, {"config.json", "pytorch_model.bin"})):
        assert resolve("org/name", allow_pickle=allow) == cache
        assert {f.name for f in cache.iterdir()} == there
    hub.clear()  # what is cached is not asked for again
    assert resolve("org/name", allow_pickle=True) == cache

    shutil.rmtree(cache)
    hub.update({"config.json", "pytorch_model.bin", "model.safetensors"})
    resolve("org/name", small=True)  # what a tokenizer or a plan needs
    assert {f.name for f in cache.iterdir()} == {"config.json"}
    resolve("org/name", allow_pickle=True)  # a cache without the weights does not do
    assert {f.name for f in cache.iterdir()} == {"config.json", "model.safetensors"}


def test_tables_of_tokens_grow_by_their_mean_and_nothing_else_does():
    source = weights.Grown(state(), TABLE, ("head.weight", "head.bias"), known=2, rows=5)
    net = meta()
    net.head = nn.Linear(3, 5)
    weights.load(net, source, TABLE)
    old = state()["old.weight"]
    assert torch.equal(net.head.weight[:2], old)
    assert torch.equal(net.head.weight[2:], old.mean(0).expand(3, 3))
    assert torch.equal(net.head.bias[2:], state()["old.bias"].mean().expand(3))
    assert torch.equal(net.blocks[0].weight, state()["attn.0.kernel"])

    # A file that has another number of rows than its config says is not mended.
    wrong = weights.Grown(state(), TABLE, ("head.weight", "head.bias"), known=4, rows=5)
    with pytest.raises(UserError, match=r"old.weight: shape \[2, 3\], the config needs \[5, 3\]"):
        weights.load(net, wrong, TABLE)
