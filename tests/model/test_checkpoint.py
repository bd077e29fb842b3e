"""A broken model directory is refused by a line that names the file and the reason."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import inspect_checkpoint, load_checkpoint, save_checkpoint
from model.errors import CheckpointError
from tests.conftest import write_llama

pytestmark = pytest.mark.fast


@pytest.fixture
def directory(tmp_path):
    write_llama(tmp_path)
    return tmp_path


def edit_config(directory, **changes):
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not known; known are: attendant, gemma2, "),
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ({"attention_bias": True}, "tensor 'model.layers.0.self_attn.q_proj.bias' is missing"),
        ({"logit_cap": 30.0}, "'logit_cap' is not known and might change the result"),
        ({"rope_parameters": {"rope_type": "yarn", "factr": 4.0}}, "rope parameter 'factr' is not known"),
        ({"num_attention_heads": 3}, "num_heads"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"hidden_size": 128}, "has shape"),
        ({"vocab_size": 2, "eos_token_id": None}, "lies outside the vocabulary"),
    ],
)
def test_a_config_that_we_would_compute_wrongly_is_refused(directory, changes, words):
    (directory / "generation_config.json").unlink()
    edit_config(directory, **changes)
    if "vocab_size" in changes:
        edit_config(directory, bos_token_id=7)
    with pytest.raises(CheckpointError, match=words) as refusal:
        inspect_checkpoint(directory)
    assert str(directory) in str(refusal.value)


def test_a_missing_directory_or_file_is_named(tmp_path, directory):
    with pytest.raises(CheckpointError, match=r"nowhere: no such model directory"):
        inspect_checkpoint(tmp_path / "nowhere")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing.*only safetensors"):
        inspect_checkpoint(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not readable as JSON"):
        inspect_checkpoint(directory)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(NORM), f"tensor '{NORM}' is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "tensor 'extra' has no place"),
        (lambda t: t.update({NORM: torch.zeros(63)}), r"has shape \[63\], the config asks for \[64\]"),
        (lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int32)}), "has dtype I32"),
        (lambda t: t[NORM].fill_(torch.nan), f"tensor '{NORM}' holds NaN"),
    ],
)
def test_a_wrong_tensor_is_named(directory, edit, words):
    edit_weights(directory, edit)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(directory)


@pytest.mark.parametrize("damage", ["truncated", "header too long", "header not JSON", "empty"])
def test_a_corrupt_file_is_refused(directory, damage):
    file = directory / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    file.write_bytes(
        {
            "truncated": data[:-100],
            "header too long": struct.pack("<Q", 1 << 60) + data[8:],
            "header not JSON": data[:8] + b"x" * length + data[8 + length :],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a valid safetensors file"):
        load_checkpoint(directory)


def shard(directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_sharded_checkpoint_loads_like_a_whole_one(directory):
    whole = load_checkpoint(directory).state_dict()
    shard(directory)
    sharded = load_checkpoint(directory).state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_an_index_cannot_point_outside_its_directory(directory):
    index = shard(directory)
    index["weight_map"][NORM] = "../a.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not the name of a safetensors file in this directory"):
        inspect_checkpoint(directory)


def test_a_shard_that_lacks_its_tensor_is_named(directory):
    index = shard(directory)
    index["weight_map"]["ghost"] = "a.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'ghost' is missing"):
        inspect_checkpoint(directory)


def test_generation_config_names_the_ends_of_sequence(directory):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert inspect_checkpoint(directory).config.eos_token_ids == (9, 2)


def test_saving_and_loading_is_the_identity(directory, tmp_path):
    decoder = load_checkpoint(directory)
    save_checkpoint(decoder, tmp_path / "copy", torch.float32)
    copy = load_checkpoint(tmp_path / "copy")
    assert copy.config == decoder.config
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), copy.parameters(), strict=True))
