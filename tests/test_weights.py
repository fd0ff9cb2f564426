"""Strict loading: every way a file can be wrong has its own line; what is written comes back."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weights
from config import UserError

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
    return {"attn.0.kernel": torch.randn(3, 3), "attn.1.kernel": torch.randn(3, 3), "old.weight": torch.randn(2, 3),
            "old.bias": torch.randn(2), "unused.a.b": torch.randn(1)}  # fmt: skip


def meta(tied=False):
    with torch.device("meta"):
        return Net(tied)


def test_rename_goes_both_ways():
    for theirs, ours in (("attn.7.kernel", "blocks.7.weight"), ("old.a.b", "head.a.b"), ("other", "other")):
        assert weights.rename(theirs, TABLE) == ours
        assert weights.rename(ours, weights.reverse(TABLE)) == theirs
    assert weights.rename("attn.7.x.kernel", TABLE) == "attn.7.x.kernel"  # `*` is one component


@pytest.mark.parametrize("shard_bytes", [10**9, 40])
def test_round_trip_in_one_file_and_in_shards(tmp_path, shard_bytes):
    weights.save(tmp_path, state(), shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 40)
    source, net = weights.Checkpoint(tmp_path), meta()
    used = weights.load(net, source, TABLE)
    assert used == set(state()) == set(source)
    back = weights.tensors(net, TABLE)
    assert back.keys() == state().keys() and all(torch.equal(back[k], v) for k, v in state().items())
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    half = meta()
    weights.load(half, source, TABLE, dtype=torch.bfloat16)
    assert half.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn.1.kernel": None}, "attn.1.kernel: missing from the weights"),
        ({"extra": torch.ones(1)}, "extra: a tensor this model has no place for"),
        ({"old.bias": torch.ones(3)}, r"old.bias: shape \[3\], the config needs \[2\]"),
        ({"head.bias": torch.ones(2)}, "a second tensor for head.bias"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    broken = {k: v for k, v in (state() | change).items() if v is not None}
    weights.save(tmp_path, broken)
    with pytest.raises(UserError, match=message):
        weights.load(meta(), weights.Checkpoint(tmp_path), TABLE)


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


def test_damaged_files(tmp_path):
    with pytest.raises(UserError, match="model.safetensors: missing"):
        weights.Checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(state(), file)
    whole = file.read_bytes()
    for content in (b"", whole[:-5], b"<!doctype html><html>", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            weights.Checkpoint(tmp_path)


def test_an_index_that_lies(tmp_path):
    weights.save(tmp_path, state(), 40)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = next(iter(good["weight_map"]))
    for name, message in (("../evil.safetensors", "outside the folder"), ("gone.safetensors", "missing")):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {first: name}}))
        with pytest.raises(UserError, match=message):
            weights.Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"ghost": good["weight_map"][first]}}))
    with pytest.raises(UserError, match="ghost: index and shards disagree"):
        weights.Checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    weights.write_file(file, "old")

    def fail(path):
        open(path, "w").write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        weights.write_file(file, fail)
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_names(tmp_path, monkeypatch):
    assert weights.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("", "./nowhere", "a/b/c", "no-such-org/no-such-model"):
        with pytest.raises(UserError, match="fix: "):
            weights.resolve(name)
