"""Turns documents into tensors: whole documents, padded to the longest of the batch, with a weight for every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from model.training.documents import ASSISTANT, EOS, USER, Author, Document, Form
from model.training.guidance import BINDING, CHOICE, HOLDER_RECALL, LENGTH, NOWHERE, PLACE_RECALL, Head
from model.training.world import KINDS, NAMES, OBJECTS, PLACES

# What a token is worth in the loss. A user's words are not the model's to predict, and a drill teaches only recall;
# both keep a little weight, so that the embeddings of all words learn from all text.
RECALL_WEIGHT = 3.0
CHOICE_WEIGHT = 2.0
USER_WEIGHT = 0.1
DRILL_WEIGHT = 0.2
NO_OPTION = -1

# Documents of this many batches are sorted by length together: less padding, and still a fresh mix every few steps.
BATCHES_PER_POOL = 4


@dataclass
class Batch:
    """Whole documents as tensors.

    token_ids, weights: [batch, length]; weights are those of the tokens as targets.
    recalls: [rows, 2] of (sequence, position of an answer token).
    choices: [rows, 2] of (sequence, position of a drawn token); options: [rows, most options], the ids that were as
    likely there, padded with NO_OPTION.
    targets: see `GuidedAttention`.
    """

    token_ids: Tensor
    weights: Tensor
    recalls: Tensor
    choices: Tensor
    options: Tensor
    targets: dict[Head, Tensor]
    num_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        targets = {head: rows.to(device) for head, rows in self.targets.items()}
        return Batch(
            self.token_ids.to(device),
            self.weights.to(device),
            self.recalls.to(device),
            self.choices.to(device),
            self.options.to(device),
            targets,
            self.num_tokens,
        )


class Collator:
    """Knows the tokens that the weights and the guidance depend on."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.user, self.assistant, self.pad = (vocabulary[token] for token in (USER, ASSISTANT, EOS))
        self.words = {word: self.word(word) for word in (*NAMES, *KINDS, *OBJECTS, *PLACES)}
        self.names = {self.words[name] for name in NAMES}
        self.bound = {self.words[word] for word in (*OBJECTS, *PLACES)}
        self.terminals = {i for token, i in vocabulary.items() if token[0] in '.?!<"' or token[-1] in ".?!"}

    def word(self, word: str) -> int:
        """The id of a word that follows a space."""
        (token_id,) = self.tokenizer.encode(f" {word}", add_special_tokens=False).ids
        return int(token_id)

    def collate(self, documents: Sequence[Document]) -> Batch:
        """One batch of whole documents."""
        encodings = self.tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
        length = max(len(encoding.ids) for encoding in encodings)
        token_ids = torch.full((len(documents), length), self.pad)
        weights = torch.zeros(len(documents), length)
        recalls: list[tuple[int, int]] = []
        choices: list[tuple[int, int]] = []
        options: list[list[int]] = []
        targets: dict[Head, list[tuple[int, ...]]] = {
            head: [] for head in (BINDING, HOLDER_RECALL, PLACE_RECALL, LENGTH, *CHOICE)
        }
        for row, (document, encoding) in enumerate(zip(documents, encodings, strict=True)):
            ids = encoding.ids
            token_ids[row, : len(ids)] = torch.tensor(ids)
            weights[row, : len(ids)] = torch.tensor(self.weigh(ids, document.is_drill))
            targets[BINDING] += [(row, *pair) for pair in self.bindings(ids)]
            for head, evidence, answer in lookups(document, encoding):
                targets[head].append((row, answer - 1, evidence))
                recalls.append((row, answer))
                weights[row, answer] = RECALL_WEIGHT
            if (asked := document.story.length_asked) is not None:
                length_word = token_at(encoding, asked)
                targets[LENGTH] += [(row, token_at(encoding, end), length_word) for end in document.story.sentence_ends]
            for choice in document.story.choices:
                drawn = token_at(encoding, choice.at)
                for head in CHOICE if choice.sources else ():
                    targets[head].append((row, drawn - 1, *(token_at(encoding, s) for s in choice.sources)))
                choices.append((row, drawn))
                options.append([self.words[word] for word in choice.options])
                weights[row, drawn] = CHOICE_WEIGHT
        return Batch(
            token_ids,
            weights,
            torch.tensor(recalls).reshape(-1, 2),
            torch.tensor(choices).reshape(-1, 2),
            padded(options, NO_OPTION),
            {head: padded(rows, NOWHERE) for head, rows in targets.items()},
            sum(len(encoding.ids) for encoding in encodings),
        )

    def weigh(self, ids: list[int], is_drill: bool) -> list[float]:
        """The weight of each token as a target, recalls aside."""
        weights, speaker = [], self.assistant
        for token_id in ids:
            weights.append(USER_WEIGHT if speaker == self.user else DRILL_WEIGHT if is_drill else 1.0)
            if token_id in (self.user, self.assistant):
                speaker = token_id
        return weights

    def bindings(self, ids: list[int]) -> list[tuple[int, int]]:
        """(position of an object or place, position of what binds it): the nearest name, or the sentence's start."""
        pairs, binder = [], 0
        for position, token_id in enumerate(ids):
            if token_id in self.names or token_id in self.terminals:
                binder = position
            elif token_id in self.bound:
                pairs.append((position, binder))
        return pairs


def padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Rows of different lengths as one tensor, [rows, longest]."""
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], dtype=torch.long).view(
        len(rows), width
    )


def lookups(document: Document, encoding: Encoding) -> list[tuple[Head, int, int]]:
    """(the head that should look, token of the evidence, token of the answer) for every recall of the document."""
    heads = {"holder": HOLDER_RECALL, "place": PLACE_RECALL}
    found = []
    for recall in document.recalls:
        evidence, answer = token_at(encoding, recall.evidence), token_at(encoding, recall.answer)
        found.append((heads[recall.about], evidence, answer))
    return found


def token_at(encoding: Encoding, character: int) -> int:
    """The token that holds a character of the text."""
    token: int | None = encoding.char_to_token(character)
    assert token is not None, f"no token holds character {character}"
    return token


class BatchStream:
    """Batches by step number, so that a resumed run reads what an uninterrupted one would have read."""

    def __init__(self, tokenizer: Tokenizer, seed: int, tokens_per_batch: int) -> None:
        self.collator = Collator(tokenizer)
        self.seed = seed
        self.tokens_per_batch = tokens_per_batch
        self.pool: tuple[object, list[list[Document]]] = (None, [])

    def batch(self, step: int, forms: dict[Form, float]) -> Batch:
        """The batch of a step. Documents of one batch have one form; `forms` gives each form's share of the steps."""
        key = (step // BATCHES_PER_POOL, tuple(forms.items()))
        if self.pool[0] != key:
            self.pool = (key, self._fill(step // BATCHES_PER_POOL, forms))
        return self.collator.collate(self.pool[1][step % BATCHES_PER_POOL])

    def _fill(self, number: int, forms: dict[Form, float]) -> list[list[Document]]:
        """Write one pool of documents of one form and cut it into batches by length."""
        author = Author(f"{self.seed}/{number}")
        form = author.rng.choices(list(forms), list(forms.values()))[0]
        documents: list[Document] = []
        room = self.tokens_per_batch * BATCHES_PER_POOL
        while room > 0:
            documents.append(author.write(form))
            room -= len(documents[-1].text) // 4  # about four characters a token in this language
        documents.sort(key=lambda document: len(document.text))
        batches = cut(documents, BATCHES_PER_POOL)
        author.rng.shuffle(batches)
        return batches


def cut(documents: list[Document], parts: int) -> list[list[Document]]:
    """Split sorted documents into parts of about equal length in characters."""
    total, running = sum(len(document.text) for document in documents), 0
    batches: list[list[Document]] = [[] for _ in range(parts)]
    for document in documents:
        batches[min(parts - 1, running * parts // total)].append(document)
        running += len(document.text)
    return batches
