"""Files of weights that cannot be read, in shards or whole: each is refused with what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from weight_files import VIT, build, in_file, in_shards

from zeroflow.errors import ConfigError
from zeroflow.models.weights import load_weights, read_weights


def test_shards_that_are_not_there_are_named_and_one_alone_points_to_the_index(tmp_path: Path) -> None:
    model = build(VIT, 1)
    index = in_shards(model.state_dict(), tmp_path, ".safetensors")
    with pytest.raises(ConfigError, match=r"one shard of several: name the index"):
        load_weights(model, tmp_path / "part-00000-of-00003.safetensors")
    (tmp_path / "part-00001-of-00003.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"index\.json: 1 of 3 shards are not there: part-00001-of-00003\.safetensors$"
    ):
        read_weights(index)


def test_shards_stay_inside_their_folder_and_may_be_links(tmp_path: Path) -> None:
    """Links as the hub's cache has them."""
    state, inside, outside = {"a.weight": torch.ones(2)}, tmp_path / "snapshot", tmp_path / "blob"
    inside.mkdir()
    safetensors.torch.save_file(state, outside)
    index = inside / "model.safetensors.index.json"
    for shard in ("../blob", str(outside), "x/../../blob"):
        index.write_text(json.dumps({"weight_map": {"a.weight": shard}}))
        with pytest.raises(ConfigError, match=f"outside its folder: {shard}"):
            read_weights(index)
    (inside / "a.safetensors").symlink_to(outside)
    index.write_text(json.dumps({"weight_map": {"a.weight": "a.safetensors"}}))
    assert torch.equal(read_weights(index)["a.weight"], torch.ones(2))
    index.write_text(json.dumps({"weight_map": {"b.weight": "a.safetensors"}}))
    with pytest.raises(ConfigError, match=r"not in their shard: b\.weight in a\.safetensors"):
        read_weights(index)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff", "[" * 100_000]
)
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"index\.json: cannot be read"):
        read_weights(index)


def test_an_index_that_names_itself_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": index.name}}))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_weights(index)


@pytest.mark.parametrize(("content", "reason"), [(b"hello", "KeyError: 101"), (b"", "EOFError")])
def test_a_file_of_something_else_says_what_it_was_read_as(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"w\.pth: cannot be read as a file of torch\.save: {reason}"):
        read_weights(tmp_path / "w.pth")


class Metric:
    """What a trainer keeps beside its weights."""


def test_what_holds_no_weights_or_asks_for_code_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"asks for .*Metric, which could run code; save the model's state_dict"):
        read_weights(in_file({"state_dict": {"a": torch.ones(2)}, "best": Metric()}, tmp_path))
    endless: dict[str, Any] = {}
    endless["model"] = endless
    for content in ({"epoch": 3}, [torch.ones(2)], torch.ones(2), {}, endless):
        with pytest.raises(ConfigError, match="cannot be"):
            read_weights(in_file(content, tmp_path))
