"""The embedded checkpoint: what is shipped is what was scored, others can load it, and it does what its card says."""

import hashlib
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.attention.dense import DenseCausalAttention
from model.checkpoint import load_checkpoint
from model.training.documents import Author
from model.training.evaluate import Examiner, place
from model.training.report import SCORES, Report


def test_our_logits_agree_with_those_of_transformers(storyteller: Path) -> None:
    text = Author("parity", "held_out").write("plain").text
    ids = AutoTokenizer.from_pretrained(storyteller)(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(storyteller, dtype=torch.float32)
    length = ids.shape[1]
    with torch.inference_mode():
        ours = load_checkpoint(storyteller)
        hidden = ours(ids[0], torch.arange(length), DenseCausalAttention(1, length))
        torch.testing.assert_close(ours.logits(hidden), theirs(ids).logits[0], atol=1e-3, rtol=1e-3)


def test_the_shipped_tokenizer_reads_documents_as_transformers_does(storyteller: Path) -> None:
    text = Author("parity", "held_out").write("brief").text
    ours = Tokenizer.from_file(str(storyteller / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(storyteller)(text, add_special_tokens=False)["input_ids"] == ours


def test_the_checkpoint_is_small_and_says_its_own_hash(storyteller: Path) -> None:
    weights = (storyteller / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    assert sum(file.stat().st_size for file in storyteller.iterdir()) < 20e6
    assert Report.load(storyteller / SCORES).sha256 == digest
    assert digest in (storyteller / "README.md").read_text()


def test_the_stored_recall_reaches_its_target(storyteller: Path) -> None:
    report = Report.load(storyteller / SCORES)
    assert [bucket.total for bucket in report.holders] == [200] * 5
    assert report.holder_accuracy >= 0.90
    assert all(bucket.right > bucket.last_sentence for bucket in report.holders)


@pytest.fixture(scope="module")
def examiner(storyteller: Path) -> Examiner:
    return Examiner(storyteller, "cpu", seed=9)


def test_the_model_knows_who_has_what(examiner: Examiner) -> None:
    buckets, _ = examiner.recall(per_bucket=10)
    assert [bucket.total for bucket in buckets] == [10] * 5
    assert sum(bucket.right for bucket in buckets) >= 42  # the stored score is above 90 %; fifty questions scatter


def test_sampled_stories_are_about_what_was_asked(examiner: Examiner) -> None:
    samples = examiner.sample(20, temperature=0.8)
    assert samples.on_subject >= 17
    # No less than the shipped model's own share of well-formed stories, give or take what twenty samples scatter.
    stored = Report.load(examiner.directory / SCORES).samples
    assert samples.well_formed / samples.total >= stored.well_formed / stored.total - 0.3


def test_a_questions_place_in_a_document_is_measured_in_tokens(examiner: Examiner) -> None:
    document = next(d for d in map(Author(2).write, ["plain"] * 50) if d.questions)
    encoding = examiner.tokenizer.encode(document.text, add_special_tokens=False)
    for question in document.questions:
        first, last, distance = place(document, question, encoding)
        answer = examiner.tokenizer.decode(encoding.ids[first : last + 1]).strip()
        assert answer.startswith("Now ")
        assert answer.endswith(".")
        assert question.answer in answer
        position = encoding.char_to_token(question.recall.answer)
        assert encoding.tokens[position - distance].strip("Ġ") in (question.subject, question.answer)
