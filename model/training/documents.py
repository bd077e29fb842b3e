"""Whole documents, as the model reads them: a chat that asks for a story, a plain story with questions, or a drill.

Every document is complete, from `<|bos|>` to `<|eos|>`: a fragment would teach the model to stop early.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from model.training.stories import Recall, Size, Split, Story, Storyteller
from model.training.world import KINDS, NAMES, OBJECTS, with_article

BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"

Form = Literal["drill", "brief", "plain", "long", "longest"]

SIZES: dict[Form, Size] = {
    "drill": Size(cast=(3, 6), objects=(3, 7), events=(2, 9)),
    "brief": Size(cast=(2, 4), objects=(1, 3), events=(2, 6)),
    "plain": Size(cast=(2, 5), objects=(1, 4), events=(5, 13)),
    "long": Size(cast=(3, 6), objects=(3, 7), events=(14, 32), busy=2),
    "longest": Size(cast=(3, 6), objects=(4, 9), events=(30, 52), busy=2),
}

# What a request calls a story of that length.
LENGTH_WORDS: dict[Form, str] = {"brief": "short ", "plain": "", "long": "long ", "longest": "very long "}

REQUESTS = (
    "Tell me a {size}story about {subject}.",
    "Tell me a {size}story about {subject}.",
    "Please tell me a {size}story about {subject}.",
    "Write a {size}story about {subject}.",
    "Can you tell me a {size}story about {subject}?",
    "I want to hear a {size}story about {subject}.",
)

HOLDER_QUESTIONS = ("Who has the {o}?", "Who has the {o}?", "Who has the {o} now?")
PLACE_QUESTIONS = ("Where is {a}?", "Where is {a}?", "Where is {a} now?")
HOLDER_ANSWER = "Now {a} has the {o}."
PLACE_ANSWER = "Now {a} is at the {p}."

# More questions than any story leaves open.
ALL = 99


@dataclass(frozen=True)
class Question:
    """A question that the document asks after its story.

    subject: the object or the character that it is about; answer: the name or place that is right; recall: where both
    the answer and its evidence stand in the text.
    """

    subject: str
    answer: str
    recall: Recall


@dataclass
class Document:
    """A text with what is known about it.

    is_drill: only its recalls are worth learning; told: where the story itself begins and ends in the text.
    """

    story: Story
    is_drill: bool = False
    told: tuple[int, int] = (0, 0)
    questions: list[Question] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole document, special tokens included."""
        return self.story.text

    @property
    def tale(self) -> str:
        """The story alone, without the request before it and the questions after it. Empty for a drill."""
        return self.text[slice(*self.told)]

    @property
    def recalls(self) -> list[Recall]:
        """Every word that the text before it determines, in the story and after it."""
        return self.story.recalls


class Author:
    """Writes documents of one side of the split."""

    def __init__(self, seed: int | str, split: Split = "train") -> None:
        self.rng = Random(f"{split}/{seed}")
        self.teller = Storyteller(self.rng, split)

    def write(self, form: Form) -> Document:
        """One document: mostly a chat, sometimes plain text."""
        if form == "drill":
            return self.drill()
        return self.chat(form) if self.rng.random() < 0.7 else self.plain(form)

    def lead(self) -> tuple[str, str, str]:
        """A hero, a kind of hero and an object that may meet on this side of the split."""
        while True:
            hero, kind, main = (self.rng.choice(pool) for pool in (NAMES, KINDS, OBJECTS))
            if self.teller.may_own(hero, main):
                return hero, kind, main

    def chat(self, form: Form) -> Document:
        """A request, a story that follows it, and questions in later turns."""
        rng = self.rng
        hero, kind, main = self.lead()
        named = rng.choice([with_article(kind), with_article(kind), f"{with_article(kind)} named {hero}", hero])
        request = rng.choice(REQUESTS).format(size=LENGTH_WORDS[form], subject=f"{named} and {with_article(main)}")
        document = Document(Story(f"{BOS}{USER}{request}{ASSISTANT}"))
        length = LENGTH_WORDS[form].split()[-1:] or ["story"]  # who asks for no length means one, too
        document.story.length_asked = document.text.index(length[0])
        subject = document.text.index(" about ")
        for word in (hero, kind, main):
            if word in named.split() or word == main:
                document.story.asked[word] = document.text.index(f" {word}", subject) + 1
        self.tell(document, form, hero, kind, main)
        document.story.text += EOS
        self.ask(document, f"{USER}{{question}}{ASSISTANT}{{answer}}{EOS}", rng.randint(0, 5))
        return document

    def tell(self, document: Document, form: Form, hero: str, kind: str, main: str) -> None:
        """Tell the story of a document, and note where it stands."""
        start = len(document.text)
        self.teller.tell(document.story, SIZES[form], hero, kind, main)
        document.told = (start, len(document.text))

    def plain(self, form: Form) -> Document:
        """A story as plain text, then questions and answers as plain text."""
        document = Document(Story(BOS))
        self.tell(document, form, *self.lead())
        self.ask(document, " Question: {question} Answer: {answer}", self.how_many(form))
        document.story.text += EOS
        return document

    def how_many(self, form: Form) -> int:
        """How many questions to ask: some, or after a story that leaves objects behind, all."""
        return ALL if SIZES[form].busy else self.rng.randint(0, 5)

    def drill(self) -> Document:
        """Pure recall: a cast, objects that change hands, and every one of them asked about."""
        rng = self.rng
        story = Story(f"{BOS}Listen.", cast=rng.sample(NAMES, rng.randint(*SIZES["drill"].cast)))
        document = Document(story, is_drill=True)
        for _ in range(rng.randint(*SIZES["drill"].objects)):
            self.teller.new_object(story)
        for _ in range(rng.randint(*SIZES["drill"].events)):
            rng.choice((self.teller.hand_over, self.teller.move))(story)
        if rng.random() < 0.5:
            self.ask(document, " Question: {question} Answer: {answer}", ALL)
            story.text += EOS
        else:
            story.text += EOS
            self.ask(document, f"{USER}{{question}}{ASSISTANT}{{answer}}{EOS}", 12)
        return document

    def ask(self, document: Document, turn: str, limit: int) -> None:
        """Append up to `limit` different questions, each in the shape `turn`, with their right answers."""
        story = document.story
        subjects = [*story.holder, *(name for name in story.place)]
        for subject in self.rng.sample(subjects, min(limit, len(subjects))):
            before, between, after = turn.replace("{answer}", "{question}").split("{question}")
            if subject in story.holder:
                question = self.rng.choice(HOLDER_QUESTIONS).format(o=subject)
                lead, tail = HOLDER_ANSWER.format(a="\0", o=subject).split("\0")
                answer, about, evidence = story.holder[subject], "holder", story.object_seen[subject]
            else:
                question = self.rng.choice(PLACE_QUESTIONS).format(a=subject)
                lead, tail = PLACE_ANSWER.format(a=subject, p="\0").split("\0")
                answer, about, evidence = story.place[subject], "place", story.place_seen[subject]
            story.text += f"{before}{question}{between}{lead}"
            recall = Recall("holder" if about == "holder" else "place", len(story.text), evidence)
            story.recalls.append(recall)
            document.questions.append(Question(subject, answer, recall))
            story.text += f"{answer}{tail}{after}"


def endless(seed: int | str, forms: dict[Form, float], split: Split = "train") -> Iterator[Document]:
    """Documents without end; `forms` gives each form's share."""
    author = Author(seed, split)
    while True:
        yield author.write(author.rng.choices(list(forms), list(forms.values()))[0])
