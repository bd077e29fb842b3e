"""Text to token ids, and the bytes that each token stands for."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from model.errors import CheckpointError

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
WORD_START = "\u2581"  # what SentencePiece writes for a space


class Tokenizer:
    """A `tokenizer.json`, with the bytes of every token beside it.

    Bytes, because a token need not hold whole characters: joining bytes and decoding once is exact for any Unicode,
    where joining the texts of single tokens is not.
    """

    def __init__(self, fast: FastTokenizer, token_bytes: Sequence[bytes]) -> None:
        self._fast = fast
        self._token_bytes = token_bytes

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer":
        """Read `tokenizer.json`. Raises `CheckpointError`."""
        file = directory / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"{file}: missing")
        try:
            text = file.read_text(encoding="utf-8")
            raw = json.loads(text)
            fast = FastTokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise CheckpointError(f"{file}: not a usable tokenizer: {error}") from error
        fast.no_truncation()
        fast.no_padding()
        return cls(fast, _token_bytes(file, raw, fast))

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to one below this."""
        return len(self._token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer's own post-processor adds."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special ones left out; bytes that are no character become U+FFFD."""
        return b"".join(self.token_bytes(token_id) for token_id in token_ids).decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int | None:
        """The id of the token of this name; None where the vocabulary has none."""
        token_id: int | None = self._fast.token_to_id(name)
        return token_id

    def token_name(self, token_id: int) -> str:
        """What the vocabulary calls a token: the only text that a special one has. Empty for ids beyond it."""
        return self._fast.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for. Empty for special tokens, and for ids that only the model's padding has."""
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""


def _token_bytes(file: Path, raw: Mapping[str, Any], fast: FastTokenizer) -> list[bytes]:
    added = {token["id"]: token for token in raw.get("added_tokens") or []}
    to_bytes = _byte_level if _uses(raw.get("decoder"), "ByteLevel") else _sentencepiece
    if to_bytes is _sentencepiece and not (_uses(raw.get("decoder"), "ByteFallback", "Metaspace")):
        raise CheckpointError(f"{file}: its decoder is neither byte-level nor SentencePiece-style")
    vocabulary = {token_id: token for token, token_id in fast.get_vocab(with_added_tokens=True).items()}
    table = []
    for token_id in range(max(vocabulary) + 1):
        if token_id in added:
            table.append(b"" if added[token_id]["special"] else added[token_id]["content"].encode())
        else:
            table.append(to_bytes(vocabulary.get(token_id, "")))
    return table


def _uses(decoder: Mapping[str, Any] | None, *types: str) -> bool:
    """Whether a decoder of `tokenizer.json`, or one inside its sequence, is of one of these types."""
    if decoder is None:
        return False
    return decoder["type"] in types or any(_uses(inner, *types) for inner in decoder.get("decoders", ()))


def _byte_level(token: str) -> bytes:
    return bytes(BYTE_OF_CHARACTER[character] for character in token)


def _sentencepiece(token: str) -> bytes:
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace(WORD_START, " ").encode()


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own Latin-1 character, the others stand in order from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _bytes_by_character()
