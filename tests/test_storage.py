"""Model folders: whole or not at all, strict, and clear about what does not fit."""

import dataclasses
import errno
import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from sdlib import storage
from sdlib.storage import Config, Pretrained, atomic_folder, load_strictly, read_json


@dataclasses.dataclass(frozen=True)
class NetConfig(Config):
    width: int = 3
    levels: tuple[int, ...] = (1, 2)
    FIXED: ClassVar = {"act": ("silu", "swish")}
    IGNORED: ClassVar = frozenset({"sample_rate"})


class Net(Pretrained):
    config_class = NetConfig
    identity = {"_class_name": "Net"}

    def __init__(self, config: NetConfig):
        super().__init__()
        self.config = config
        self.linear = torch.nn.Linear(config.width, config.width)
        self.register_buffer("count", torch.tensor(7))


@pytest.fixture
def folder(tmp_path):
    Net(NetConfig()).save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def test_round_trip(tmp_path):
    net = Net(NetConfig(width=4, levels=(5, 6, 7)))
    net.save_pretrained(tmp_path / "net")
    again = Net.from_pretrained(tmp_path / "net")
    assert again.config == net.config and not again.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert json.loads((tmp_path / "net/config.json").read_text())["_class_name"] == "Net"


def test_half_precision_keeps_integers(tmp_path):
    Net(NetConfig()).save_pretrained(tmp_path / "net", torch.float16)
    stored = storage.read_weights(tmp_path / "net" / Net.weights_name)
    assert stored["linear.weight"].dtype == torch.float16
    assert stored["count"].dtype == torch.int64
    assert Net.from_pretrained(tmp_path / "net").linear.weight.dtype == torch.float32
    half = Net.from_pretrained(tmp_path / "net", torch.bfloat16)
    assert half.linear.weight.dtype == torch.bfloat16 and int(half.count) == 7


def test_settings_of_the_ecosystem():
    config = NetConfig.from_dict({"width": 5, "levels": [1], "act": "swish",
                                  "sample_rate": 3, "_diffusers_version": "0.42"})
    assert config == NetConfig(5, (1,))
    with pytest.raises(ValueError, match="act='relu'.*silu"):
        NetConfig.from_dict({"act": "relu"})
    with pytest.raises(ValueError, match="unknown setting 'wdith'"):
        NetConfig.from_dict({"wdith": 3})
    assert NetConfig.from_dict(config.to_dict()) == config


def test_missing_and_broken_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Net.from_pretrained(folder.parent / "nowhere")
    weights = folder / Net.weights_name
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=Net.weights_name):
        Net.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=Net.weights_name):
        Net.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        Net.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_json(folder / "config.json")


def test_another_class_is_refused(folder):
    values = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(values | {"_class_name": "Other"}))
    with pytest.raises(ValueError, match="'Other', not a 'Net'"):
        Net.from_pretrained(folder)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("count"), "missing count"),
    (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
    (lambda s: s.update({"linear.bias": torch.zeros(4)}), r"linear.bias has shape \(4,\)"),
])
def test_loading_is_strict(folder, change, words):
    state = storage.read_weights(folder / Net.weights_name)
    change(state)
    save_file(state, folder / Net.weights_name)
    with pytest.raises(ValueError, match=words):
        Net.from_pretrained(folder)


def test_strict_loading_changes_nothing_when_it_fails():
    net = Net(NetConfig())
    before = net.linear.weight.clone()
    with pytest.raises(ValueError):
        load_strictly(net, {"linear.weight": torch.zeros(3, 3)}, "a test")
    assert torch.equal(net.linear.weight, before)


def test_a_failed_write_leaves_the_old_folder(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_weights", full)
    with pytest.raises(OSError, match="No space left"):
        Net(NetConfig(width=9)).save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_atomic_folder_replaces_and_appears_only_when_whole(tmp_path):
    with atomic_folder(tmp_path / "a/b") as draft:
        (draft / "one").write_text("1")
        assert not (tmp_path / "a/b").exists()
    with atomic_folder(tmp_path / "a/b") as draft:
        (draft / "two").write_text("2")
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["two"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
