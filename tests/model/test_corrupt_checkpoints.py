"""Whatever is wrong with a weight file, it is refused by a line that names the file, and the tensor if there is one."""

import json
import pickle
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import INDEX, WEIGHTS, load_checkpoint
from model.errors import CheckpointError
from tests.conftest import write_llama

pytestmark = pytest.mark.fast

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
DOWN, QUERY = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
SOME = (EMBEDDING, NORM, DOWN, QUERY)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    write_llama(directory, num_hidden_layers=2)
    load_checkpoint(directory)
    return directory


@pytest.fixture
def directory(sound, tmp_path) -> Path:
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def split(data: bytes) -> tuple[bytes, bytes]:
    """The header and the tensors' bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def joined(header: object, tensors: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def edited(data: bytes, edit) -> bytes:
    header, tensors = split(data)
    raw = json.loads(header)
    edit(raw)
    return joined(raw, tensors)


def refuse(directory: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(directory)
    message = str(refusal.value)
    assert message.startswith(str(directory))
    for word in words:
        assert word in message, message


def cuts() -> list:
    return [pytest.param(lambda data, n=n: data[: n if n >= 0 else len(data) + n], id=f"cut at {n}") for n in (
        0, 1, 7, 8, 9, 100, 1000, 5000, 50_000, -100_000, -4097, -4096, -100, -4, -1
    )]  # fmt: skip


def header_lengths() -> list:
    def with_length(data: bytes, change) -> bytes:
        return struct.pack("<Q", change(len(split(data)[0]), len(data)) % 2**64) + data[8:]

    changes = {
        "0": lambda n, size: 0, "1": lambda n, size: 1, "2": lambda n, size: 2, "one less": lambda n, size: n - 1,
        "one more": lambda n, size: n + 1, "eight more": lambda n, size: n + 8, "half": lambda n, size: n // 2,
        "twice": lambda n, size: 2 * n, "the file's": lambda n, size: size, "all the rest": lambda n, size: size - 8,
        "one too many": lambda n, size: size - 7, "2^31": lambda n, size: 2**31, "2^32": lambda n, size: 2**32,
        "2^60": lambda n, size: 2**60, "2^63": lambda n, size: 2**63, "-1": lambda n, size: -1,
    }  # fmt: skip
    return [
        pytest.param(lambda data, c=change: with_length(data, c), id=f"header length {name}")
        for name, change in changes.items()
    ]


def headers() -> list:
    texts = {
        "a list": b"[]", "null": b"null", "a number": b"1", "a text": b'"x"', "nothing": b"", "no tensors": b"{}",
        "unfinished": b'{"a": ', "not UTF-8": b'{"\xff": 1}', "UTF-16": "{}".encode("utf-16"), "NaN": b"NaN",
        "100,000 lists deep": b"[" * 100_000, "100,000 objects deep": b'{"a":' * 100_000,
        "10,000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
    }  # fmt: skip
    return [
        pytest.param(lambda data, t=text: joined(t, split(data)[1]), id=f"header: {name}")
        for name, text in texts.items()
    ]


def noise() -> list:
    def scrambled(data: bytes, seed: int) -> bytes:
        header, tensors = split(data)
        generator, text = random.Random(seed), bytearray(header)
        for _ in range(12):
            text[generator.randrange(len(text))] = generator.choice(b'0123456789{}[],:"x')
        return joined(bytes(text), tensors)

    return [pytest.param(lambda data, s=seed: scrambled(data, s), id=f"noise {seed}") for seed in range(40)]


@pytest.mark.parametrize("mutate", [*cuts(), *header_lengths(), *headers(), *noise()])
def test_a_file_that_is_no_safetensors_file_is_refused(directory, mutate):
    file = directory / WEIGHTS
    file.write_bytes(mutate(file.read_bytes()))
    refuse(directory, WEIGHTS)


ENTRIES = {
    "dtype F64": {"dtype": "F64"},
    "dtype I32": {"dtype": "I32"},
    "dtype BF16": {"dtype": "BF16"},
    "dtype F8_E4M3": {"dtype": "F8_E4M3"},
    "dtype unknown": {"dtype": "F33"},
    "dtype null": {"dtype": None},
    "dtype a number": {"dtype": 32},
    "shape empty": {"shape": []},
    "shape of one more": lambda entry: {"shape": [entry["shape"][0] + 1, *entry["shape"][1:]]},
    "shape with a 0": lambda entry: {"shape": [0, *entry["shape"]]},
    "shape with a 1": lambda entry: {"shape": [1, *entry["shape"]]},
    "shape flat": lambda entry: {"shape": [*entry["shape"][:-1], entry["shape"][-1] // 2, 2]},
    "shape negative": lambda entry: {"shape": [-entry["shape"][0], *(-n for n in entry["shape"][1:])]},
    "shape of floats": lambda entry: {"shape": [float(n) for n in entry["shape"]]},
    "shape of texts": lambda entry: {"shape": [str(n) for n in entry["shape"]]},
    "shape huge": {"shape": [2**62, 2**62]},
    "shape true": {"shape": [True]},
    "shape null": {"shape": None},
    "offsets swapped": lambda entry: {"data_offsets": entry["data_offsets"][::-1]},
    "offsets empty": {"data_offsets": []},
    "offsets of three": lambda entry: {"data_offsets": [*entry["data_offsets"], 0]},
    "offsets negative": {"data_offsets": [-8, -4]},
    "offsets of floats": lambda entry: {"data_offsets": [float(n) for n in entry["data_offsets"]]},
    "offsets huge": {"data_offsets": [2**63, 2**63 + 256]},
    "offsets behind the end": lambda entry: {"data_offsets": [n + 10**7 for n in entry["data_offsets"]]},
    "offsets overlapping": lambda entry: {"data_offsets": [n + 4 for n in entry["data_offsets"]]},
    "offsets of a byte less": lambda entry: {"data_offsets": [n - i for i, n in enumerate(entry["data_offsets"])]},
    "a field more": {"strides": [1]},
    "a field less": lambda entry: entry.pop("shape") and {},
}


@pytest.mark.parametrize("tensor", SOME)
@pytest.mark.parametrize("change", ENTRIES)
def test_a_line_of_the_header_that_cannot_be_is_refused_with_a_tensor_s_name(directory, tensor, change):
    def edit(raw):
        new = ENTRIES[change]
        raw[tensor].update(new(raw[tensor]) if callable(new) else new)

    file = directory / WEIGHTS
    file.write_bytes(edited(file.read_bytes(), edit))
    # Of two tensors that overlap, or of a gap between them, the second is named.
    refuse(directory, WEIGHTS, "tensor '", "" if change.startswith("offsets") else tensor)


@pytest.mark.parametrize("value", [None, 7, "F32", [], {}], ids=repr)
def test_a_line_of_the_header_that_is_no_object_is_refused(directory, value):
    file = directory / WEIGHTS
    file.write_bytes(edited(file.read_bytes(), lambda raw: raw.update({QUERY: value})))
    refuse(directory, WEIGHTS, QUERY)


def test_a_tensor_named_twice_is_refused(directory):
    file = directory / WEIGHTS
    header, tensors = split(file.read_bytes())
    again = json.dumps({NORM: json.loads(header)[NORM]}).encode()
    file.write_bytes(joined(header.rstrip()[:-1] + b", " + again[1:], tensors))
    refuse(directory, WEIGHTS, f"names '{NORM}' twice")


def test_bytes_that_belong_to_no_tensor_are_refused(directory):
    file = directory / WEIGHTS
    file.write_bytes(file.read_bytes() + b"PK")
    refuse(directory, WEIGHTS, "2 bytes follow its last tensor")


TENSORS = {
    "missing": (lambda t, n: t.pop(n), "is missing"),
    "renamed": (lambda t, n: t.update({n + "s": t.pop(n)}), ""),
    "of another size": (lambda t, n: t.update({n: torch.zeros(3, *t[n].shape[1:])}), "has shape"),
    "of another rank": (lambda t, n: t.update({n: t[n][None].clone()}), "has shape"),
    "of whole numbers": (lambda t, n: t.update({n: t[n].to(torch.int8)}), "has dtype I8"),
    "of double precision": (lambda t, n: t.update({n: t[n].double()}), "has dtype F64"),
    "NaN first": (lambda t, n: t[n].view(-1)[0].fill_(torch.nan), "holds NaN"),
    "NaN last": (lambda t, n: t[n].view(-1)[-1].fill_(torch.nan), "holds NaN"),
    "infinite": (lambda t, n: t[n].view(-1)[5].fill_(torch.inf), "infinite"),
    "infinitely small": (lambda t, n: t[n].view(-1)[7].fill_(-torch.inf), "infinite"),
    "NaN in bf16": (lambda t, n: t.update({n: t[n].fill_(torch.nan).bfloat16()}), "holds NaN"),
    "infinite in fp16": (lambda t, n: t.update({n: (t[n].abs() + 1e6).half()}), "infinite"),
}


@pytest.mark.parametrize("tensor", SOME)
@pytest.mark.parametrize("change", TENSORS)
def test_a_tensor_that_is_not_what_the_config_asks_for_is_refused_by_name(directory, tensor, change):
    edit, words = TENSORS[change]
    tensors = load_file(directory / WEIGHTS)
    edit(tensors, tensor)
    save_file(tensors, directory / WEIGHTS)
    refuse(directory, tensor, words)


@pytest.mark.parametrize("name", ["extra", "model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", ""])
def test_a_tensor_that_has_no_place_is_refused_by_name(directory, name):
    tensors = load_file(directory / WEIGHTS)
    save_file(tensors | {name: torch.zeros(2)}, directory / WEIGHTS)
    refuse(directory, WEIGHTS, f"tensor {name!r} has no place")


def shard(directory: Path) -> dict:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    held = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in held.items():
        save_file({name: tensors[name] for name in own}, directory / file)
    return {name: file for file, own in held.items() for name in own}


@pytest.mark.parametrize(
    "target",
    ["../a.safetensors", "/etc/passwd", "a", "", ".", "..", "sub/a.safetensors", "pytorch_model.bin", "a.safetensors\0",
     7, None, ["a.safetensors"]],
    ids=repr,
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(directory, target):
    index = shard(directory)
    (directory / "pytorch_model.bin").write_bytes((directory / "a.safetensors").read_bytes())
    (directory / INDEX).write_text(json.dumps({"weight_map": index | {NORM: target}}))
    refuse(directory, INDEX, f"{target!r} is not the name of a safetensors file in this directory")


def test_a_shard_that_is_not_there_is_named(directory):
    index = shard(directory)
    for target in ("c.safetensors", "x" * 5000 + ".safetensors"):
        (directory / INDEX).write_text(json.dumps({"weight_map": index | {NORM: target}}))
        refuse(directory, target)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 100_000, "\xff"]
)
def test_an_index_that_is_none_is_refused(directory, text):
    shard(directory)
    (directory / INDEX).write_bytes(text.encode("latin-1"))
    refuse(directory, INDEX)


def test_an_index_and_its_shards_agree_on_every_tensor(directory):
    index = shard(directory)
    (directory / INDEX).write_text(
        json.dumps({"weight_map": index | {NORM: "a.safetensors", "ghost": "b.safetensors"}})
    )
    refuse(directory, "b.safetensors: tensor 'ghost' is missing")
    (directory / INDEX).write_text(json.dumps({"weight_map": {n: f for n, f in index.items() if n != QUERY}}))
    refuse(directory, index[QUERY], QUERY)


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 2**62}, {"hidden_size": 2**62}, {"num_hidden_layers": 10**9}, {"intermediate_size": 10**15},
     {"max_position_embeddings": 10**15}, {"head_dim": 2**40}, {"num_attention_heads": 10**12},
     {"num_hidden_layers": 1}, {"num_key_value_heads": 4}, {"vocab_size": 321}],
    ids=str,
)  # fmt: skip
def test_a_config_whose_sizes_the_weights_do_not_have_is_refused(directory, changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refuse(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "nul", "[" * 100_000, '{"a": 1' + "0" * 10_000 + "}"], ids=lambda t: t[:9]
)
def test_json_that_is_none_is_refused(directory, name, text):
    (directory / name).write_text(text)
    refuse(directory, name)


def test_directories_and_dangling_links_in_the_place_of_files_are_refused(directory):
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()
    refuse(directory, WEIGHTS)
    (directory / WEIGHTS).rmdir()
    (directory / WEIGHTS).symlink_to(directory / "nowhere")
    refuse(directory, WEIGHTS)


class Malice:
    def __reduce__(self):
        return Path.touch, (Path(__file__).parent / "pickle-was-opened",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", WEIGHTS])
def test_a_pickle_is_never_opened(directory, name):
    (directory / WEIGHTS).unlink()
    (directory / name).write_bytes(pickle.dumps(Malice()))
    refuse(directory, WEIGHTS)
    assert not (Path(__file__).parent / "pickle-was-opened").exists()
