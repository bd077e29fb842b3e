"""The generator, its split and its checker. A story of a dozen sentences, written by hand, is the yardstick."""

import re
from itertools import islice

import pytest

from model.training.checker import check, one_of, parse
from model.training.documents import Author, Document, Form, endless
from model.training.frames import FRAMES, Event, Frame
from model.training.world import NAMES, OBJECTS, held_out

ALL_FORMS: dict[Form, float] = {"drill": 1, "brief": 1, "plain": 1, "long": 1, "longest": 0.5}
NAME_OR_OBJECT = re.compile(rf"\b(?:(?P<name>{one_of(NAMES)})|(?P<object>{one_of(OBJECTS)}))\b")

STORY = (
    "Once upon a time there was a fox named Rufus. Rufus had two friends, Mia and Tom. Rufus found an old lantern. "
    "Tom made a kite. The lantern was very heavy. So Rufus gave Mia the lantern. Mia went to the mill. "
    'Everyone loved the kite. But Mia took the kite from Tom. Who had the lantern? Now Mia had the lantern. "Good '
    'morning!" said Tom to Rufus. They stayed friends for ever. The end.'
)


def documents(split: str, number: int) -> list[Document]:
    return list(islice(endless("test", ALL_FORMS, split), number))  # type: ignore[arg-type]


def owners_by_the_binding_rule(text: str) -> dict[str, str]:
    """Who has what at the end, by the one rule: the nearest name before an object in its sentence owns it."""
    owners: dict[str, str] = {}
    for sentence in re.split(r'(?<=[.?!]) |(?<=[.?!]") (?=[A-Z])', text):
        name = None
        for match in NAME_OR_OBJECT.finditer(sentence):
            name = match["name"] or name
            if match["object"] and name:
                owners[match["object"]] = name
    return owners


def ownerships(text: str) -> set[tuple[str, str]]:
    """Every (owner, object) pair that a story or drill brings about, read back by its frames."""
    pairs, rest = set(), text
    while rest:
        event, match = parse(rest)
        if event in {Event.FIND, Event.GIVE, Event.TAKE}:
            thing = match["thing"].split(" ")[-1] if event is Event.FIND else match["o"]
            pairs.add((match["a" if event is Event.FIND else "b"], thing))
        rest = rest[match.end() :].removeprefix(" ")
    return pairs


def body(document: Document) -> str:
    """The story, or what a drill tells before it asks."""
    return document.tale or re.split(r"<\|eos\|>| Question:", document.text)[0].removeprefix("<|bos|>Listen. ")


def test_a_seed_is_a_story() -> None:
    assert [Author(7).write("plain").text for _ in range(2)] == [Author(7).write("plain").text] * 2
    assert Author(7).write("plain").text != Author(8).write("plain").text
    assert Author(7, "train").write("plain").text != Author(7, "held_out").write("plain").text


def test_stories_are_distinct() -> None:
    author = Author("distinct")
    assert len({author.write("plain").tale for _ in range(2000)}) == 2000


def test_no_training_document_holds_a_held_out_pair() -> None:
    pairs = set().union(*(ownerships(body(document)) for document in documents("train", 400)))
    assert len(pairs) > 1500
    assert not [pair for pair in pairs if held_out(*pair)]


def test_held_out_stories_are_about_held_out_pairs() -> None:
    for document in documents("held_out", 100):
        if document.tale:
            assert held_out(document.story.hero, document.story.main)


def test_an_eighth_of_all_pairs_is_held_out() -> None:
    pairs = [(name, thing) for name in NAMES for thing in OBJECTS]
    assert sum(held_out(*pair) for pair in pairs) / len(pairs) == pytest.approx(1 / 8, abs=0.005)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_checker_accepts_every_generated_story(split: str) -> None:
    verdicts = [check(document.tale) for document in documents(split, 300) if document.tale]
    assert len(verdicts) > 200
    assert [verdict.reason for verdict in verdicts if not verdict.ok] == []


def test_the_checker_accepts_a_story_written_by_hand() -> None:
    assert check(STORY).ok, check(STORY).reason


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("So Rufus gave Mia the lantern", "So Tom gave Mia the lantern", "Rufus has the lantern, not Tom"),
        ("took the kite from Tom", "took the kite from Rufus", "Tom has the kite, not Rufus"),
        ("Now Mia had the lantern", "Now Tom had the lantern", "Mia has the lantern, not Tom"),
        ("gave Mia the lantern", "gave Rufus the lantern", "Rufus meets Rufus"),
        ("Mia and Tom", "Mia and Mia", "a friend twice"),
        ("Mia and Tom", "Rufus and Tom", "a friend twice"),
        ("two friends", "three friends", "miscounted friends"),
        ("Tom made a kite", "Ella made a kite", "Ella was never introduced"),
        ("Tom made a kite", "Tom made a lantern", "there is a lantern already"),
        ("an old lantern", "a old lantern", "wrong article"),
        ("a fox", "an fox", "wrong article"),
        ("Everyone loved the kite", "Everyone loved the drum", "nobody has found the drum yet"),
        ("Mia went to the mill. ", "Mia went to the mill. Mia went to the mill. ", "already at the mill"),
        (" They stayed friends for ever. The end.", "", "no ending"),
        (" The end.", " The end. The sun was shining.", "goes on after its ending"),
        ("Once upon a time there was a fox named Rufus. ", "", "the opening stands first"),
        ("went to the mill", "went to the moon", "no sentence of this world"),
        ("Rufus found an old lantern. ", "It began to rain. Rufus found an old lantern. ", "finds something first"),
    ],
)
def test_the_checker_rejects_a_corruption(old: str, new: str, reason: str) -> None:
    assert old in STORY
    verdict = check(STORY.replace(old, new))
    assert not verdict.ok
    assert reason in verdict.reason


def test_the_checker_rejects_a_story_cut_anywhere() -> None:
    assert not any(check(STORY[:end]).ok for end in range(len(STORY)))


def test_answers_are_right_under_a_replay_by_the_binding_rule() -> None:
    asked = 0
    for document in documents("train", 300):
        owners = owners_by_the_binding_rule(body(document))
        for question in document.questions:
            assert document.text[question.recall.answer :].startswith(question.answer)
            if question.recall.about == "holder":
                assert owners[question.subject] == question.answer
                asked += 1
    assert asked > 400


def test_places_are_where_the_character_went_last() -> None:
    for document in documents("train", 200):
        for question in document.questions:
            if question.recall.about == "place":
                went = re.findall(rf"\b{question.subject} (?:[a-z]+ )+the (\w+)[.]", body(document))
                told = document.text[question.recall.evidence :]
                assert question.answer in went
                assert told.startswith(question.answer)


def test_evidence_is_the_object_in_a_sentence_before_the_answer() -> None:
    for document in documents("train", 200):
        for question in document.questions:
            if question.recall.about == "holder":
                assert document.text[question.recall.evidence :].startswith(question.subject)
                assert question.recall.evidence < question.recall.answer


@pytest.mark.parametrize("event", [Event.FIND, Event.GIVE, Event.TAKE, Event.RECAP])
def test_every_frame_that_gives_an_object_names_its_owner_last_before_it(event: Event) -> None:
    for frame in FRAMES[event]:
        slots = [slot for _, slot in frame.pieces]
        last = max(slots.index(slot) for slot in ("o", "thing") if slot in slots)
        if event is Event.RECAP:
            last = len(slots) - 1 - slots[::-1].index("o")
        owner = "a" if event in {Event.FIND, Event.RECAP} else "b"
        assert [slot for slot in slots[:last] if slot in ("a", "b")][-1] == owner, frame.template


def test_a_frame_splits_into_literals_and_slots() -> None:
    assert Frame(Event.GIVE, "So {a} gave {b} the {o}.").pieces == (
        ("So ", "a"),
        (" gave ", "b"),
        (" the ", "o"),
        (".", ""),
    )
