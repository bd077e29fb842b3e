"""The tokenizer: single tokens for what is looked up, exact round trips, and a chat template that others can read."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from model.training.documents import Author
from model.training.vocabulary import VocabularyError, save_tokenizer, train_tokenizer
from model.training.world import NAMES, OBJECTS, PLACES


def test_names_objects_and_places_are_single_tokens_behind_a_space(vocabulary: Tokenizer) -> None:
    for word in (*NAMES, *OBJECTS, *PLACES):
        assert vocabulary.encode(f" {word}", add_special_tokens=False).tokens == [f"Ġ{word}"]


def test_the_vocabulary_has_the_size_that_the_world_needs(vocabulary: Tokenizer) -> None:
    assert 1536 <= vocabulary.get_vocab_size() <= 2048


@pytest.mark.parametrize("text", ["Tom found a lantern.", "Grüße, 世界 🦊\n\ttab", "  two  spaces ", ""])
def test_any_text_survives_the_round_trip(vocabulary: Tokenizer, text: str) -> None:
    assert vocabulary.decode(vocabulary.encode(text).ids) == text


def test_special_tokens_in_a_document_are_single_ids(vocabulary: Tokenizer) -> None:
    tokens = vocabulary.encode("<|bos|><|user|>Hi<|assistant|>Yes<|eos|>", add_special_tokens=False).tokens
    assert [token for token in tokens if token.startswith("<|")] == ["<|bos|>", "<|user|>", "<|assistant|>", "<|eos|>"]


def test_training_the_tokenizer_again_gives_the_same_one(vocabulary: Tokenizer) -> None:
    assert train_tokenizer(seed=0).to_str() == vocabulary.to_str()


def test_a_vocabulary_too_small_for_the_names_is_refused() -> None:
    with pytest.raises(VocabularyError, match="more than one token"):
        train_tokenizer(seed=0, vocab_size=700)


def test_a_chat_renders_in_transformers_as_it_was_trained(vocabulary: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(vocabulary, tmp_path, max_length=1024)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    document = next(d for d in map(Author(3).write, ["brief"] * 50) if "<|user|>Who" in d.text)
    turns = document.text.removeprefix("<|bos|><|user|>").removesuffix("<|eos|>").split("<|eos|><|user|>")
    messages = []
    for turn in turns:
        question, answer = turn.split("<|assistant|>")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ours = vocabulary.encode(document.text, add_special_tokens=False).ids
    assert theirs.apply_chat_template(messages, tokenize=False) == document.text
    assert theirs(document.text, add_special_tokens=False)["input_ids"] == ours
    prompt = theirs.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert document.text.startswith(prompt)
    assert prompt.endswith("<|assistant|>")


def test_plain_text_gets_the_token_that_begins_a_document(vocabulary: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(vocabulary, tmp_path, max_length=1024)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Once upon a time")["input_ids"]
    assert ids == vocabulary.encode("Once upon a time").ids
    assert ids[0] == vocabulary.token_to_id("<|bos|>")
    assert ids.count(ids[0]) == 1
