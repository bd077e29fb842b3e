"""The tokenizer: byte-level BPE, trained on the stories, and the files that carry it to other tools."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model.errors import AttendantError
from model.training.documents import ASSISTANT, BOS, EOS, USER, Form, endless
from model.training.world import KINDS, NAMES, OBJECTS, PLACES

SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT)
VOCAB_SIZE = 2048
NUM_DOCUMENTS = 20_000

# The brief stories hold every frame; a corpus of them alone is the quickest to read.
CORPUS: dict[Form, float] = {"drill": 0.3, "brief": 0.4, "plain": 0.3}

# One turn is `<|user|>text` or `<|assistant|>text<|eos|>`; other roles are refused rather than guessed at.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class VocabularyError(AttendantError):
    """The tokenizer does not hold what recall relies on."""


def train_tokenizer(seed: int, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn the merges from stories of the training split. Raises `VocabularyError` where a name takes two tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed), trainer=trainer)
    # Plain text begins a document; a rendered chat brings its own `<|bos|>` and is encoded without special tokens.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    check_single_tokens(tokenizer)
    return tokenizer


def texts(seed: int) -> Iterator[str]:
    """The documents to learn from, without their special tokens: those are never merged."""
    for document in islice(endless(f"vocabulary/{seed}", CORPUS), NUM_DOCUMENTS):
        text = document.text
        for token in SPECIAL_TOKENS:
            text = text.replace(token, "\n")
        yield from filter(None, text.split("\n"))


def check_single_tokens(tokenizer: Tokenizer) -> None:
    """Names, kinds, objects and places stand for one token each, so that a lookup is one attention hop."""
    # `Ġ` is how byte-level BPE writes a leading space.
    split = [word for word in (*NAMES, *KINDS, *OBJECTS, *PLACES) if tokenizer.token_to_id(f"Ġ{word}") is None]
    if split:
        raise VocabularyError(f"{len(split)} words take more than one token, {split[0]!r} among them")


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write tokenizer.json and what `transformers` reads beside it. `max_length`: the model's context, in tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "extra_special_tokens": {"user_token": USER, "assistant_token": ASSISTANT},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
