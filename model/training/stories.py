"""Tells one story: keeps a small world straight while it fills frames, and notes where each answer can be looked up.

The notes (`Recall`, `Choice`) are character positions. They tell the evaluation how far back the evidence stands, and
they tell the trainer where attention should look and which words would have been as good.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from model.training.frames import FRAMES, Event, Frame, friends_phrase
from model.training.world import ADJECTIVES, NAMES, OBJECTS, PLACES, article, held_out, with_article

Split = Literal["train", "held_out"]
Options = Mapping[str, Sequence[str]]
NO_OPTIONS: Options = {}


@dataclass(frozen=True)
class Recall:
    """A word that the text so far determines. Positions are characters of the whole text.

    answer: where the word starts; evidence: where the word starts that says so (the object of the owner's sentence, or
    the place of the mover's).
    """

    about: Literal["holder", "place"]
    answer: int
    evidence: int


@dataclass(frozen=True)
class Choice:
    """A word that was drawn, with equal chances. Positions as in `Recall`.

    at: where the drawn word starts; options: all that might have stood there; sources: where the text so far has them,
    none if they come from outside it.
    """

    at: int
    options: tuple[str, ...]
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """How long a story may get. Ranges are inclusive.

    busy: how many of the newest objects the story goes on about, so that older ones have to be remembered; 0 for all.
    """

    cast: tuple[int, int]
    objects: tuple[int, int]
    events: tuple[int, int]
    busy: int = 0


@dataclass
class Story:
    """A text under way, and the state of its world."""

    text: str = ""
    cast: list[str] = field(default_factory=list)
    kind: str = ""
    busy: int = 0
    holder: dict[str, str] = field(default_factory=dict)
    place: dict[str, str] = field(default_factory=dict)
    recalls: list[Recall] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    introduced: dict[str, int] = field(default_factory=dict)  # where each character is first named
    asked: dict[str, int] = field(default_factory=dict)  # where the request names hero, kind and object
    length_asked: int | None = None  # where the request says how long the story should be
    sentence_ends: list[int] = field(default_factory=list)
    # Where the last sentence about an object's owner has the object, and the last one about a mover has the place.
    object_seen: dict[str, int] = field(default_factory=dict)
    place_seen: dict[str, int] = field(default_factory=dict)

    @property
    def hero(self) -> str:
        """The character of the opening sentence."""
        return self.cast[0]

    @property
    def main(self) -> str:
        """The object that the hero finds first."""
        return next(iter(self.holder))

    def say(self, frame: Frame, options: Options = NO_OPTIONS, **slots: str) -> None:
        """Append a sentence and note its recalls and choices. The caller has made sure that it is true.

        options: for each slot that was drawn from characters or objects of the story, what it was drawn from.
        """
        self.text += " " if self.text and not self.text.endswith(">") else ""
        starts: dict[str, list[int]] = {}
        for literal, slot in frame.pieces:
            self.text += literal
            if slot:
                starts.setdefault(slot, []).append(len(self.text))
                self.text += slots[slot]
        self.sentence_ends.append(len(self.text) - 1)
        self.note_choices(options, starts)
        self.note_facts(frame.event, slots, starts)

    def note_choices(self, options: Options, starts: dict[str, list[int]]) -> None:
        """Note what each slot of the sentence was drawn from."""
        for slot, words in options.items():
            if slot in starts:
                known = self.object_seen if slot == "o" else self.introduced
                sources = tuple(known[word] for word in words if word in known)
                self.choices.append(Choice(starts[slot][0], tuple(words), sources))

    def choose(self, at: int, *words: str) -> None:
        """Note a choice that is not a slot of its own. A word of the request is its source."""
        self.choices.append(Choice(at, words, tuple(self.asked[word] for word in words if word in self.asked)))

    def note_facts(self, event: Event, slots: dict[str, str], starts: dict[str, list[int]]) -> None:
        """Note what the sentence recalls, then what it tells."""
        if event is Event.OPENING:
            self.introduced[slots["a"]] = starts["a"][0]
            self.choose(starts["a"][0], *([self.hero] if self.hero in self.asked else NAMES))
            if self.kind in self.asked:
                self.choose(starts["who"][0] + slots["who"].index(" ") + 1, self.kind)
        if event is Event.FRIENDS:
            position = starts["friends"][0]
            for name in self.cast[1:]:
                position = self.text.index(name, position)
                self.choose(position, *(other for other in NAMES if other not in self.introduced))
                self.introduced[name] = position
        thing = slots.get("o") or slots.get("thing", "").split(" ")[-1]
        if event in {Event.GIVE, Event.TAKE, Event.RECAP}:
            self.recalls.append(Recall("holder", starts["a"][0], self.object_seen[thing]))
        if event in {Event.FIND, Event.GIVE, Event.TAKE, Event.RECAP}:
            self.holder[thing] = slots["a" if event in {Event.FIND, Event.RECAP} else "b"]
            start = (starts.get("o") or starts["thing"])[-1]
            self.object_seen[thing] = start + len(slots.get("thing", thing)) - len(thing)
        if event is Event.MOVE:
            self.place[slots["a"]] = slots["p"]
            self.place_seen[slots["a"]] = starts["p"][0]


class Storyteller:
    """Draws stories for one side of the split. All chance comes from `rng`, so a seed is a story."""

    def __init__(self, rng: Random, split: Split) -> None:
        self.rng = rng
        self.split = split

    def may_own(self, name: str, thing: str) -> bool:
        """In training a held-out pair never meets; in a held-out story they are sought."""
        return held_out(name, thing) == (self.split == "held_out")

    def tell(self, story: Story, size: Size, hero: str, kind: str, main: str) -> None:
        """Tell a whole story, from `Once upon a time` to `The end.`, onto `story`."""
        rng = self.rng
        story.kind = kind
        story.busy = size.busy
        story.cast = [hero]
        story.say(self.frame(Event.OPENING), who=with_article(kind), a=hero)
        friends = rng.sample([name for name in NAMES if name != hero], rng.randint(*size.cast) - 1)
        if friends:
            story.cast += friends
            story.say(self.frame(Event.FRIENDS), {"a": [hero]}, a=hero, friends=friends_phrase(friends))
        self.find(story, hero, main, [hero])
        num_objects = rng.randint(*size.objects)
        for _ in range(rng.randint(*size.events)):
            self.happen(story, num_objects)
        story.say(self.frame(Event.ENDING))

    def frame(self, event: Event) -> Frame:
        """Any sentence for the event."""
        return self.rng.choice(FRAMES[event])

    def happen(self, story: Story, num_objects: int) -> None:
        """One event after the opening. What cannot happen (nobody to give to) gives way to scenery."""
        steps: dict[Callable[[Story], bool], float] = {
            # Where older objects are left alone, new ones come slowly: else nothing would happen to the older ones.
            self.new_object: (1.5 if story.busy else 3.0) if len(story.holder) < num_objects else 0.0,
            self.hand_over: 3.0,
            self.move: 1.5,
            self.mood: 1.5,
            self.recap: 0.7,
            self.scene: 0.4,
            self.topic: 0.4,
        }
        step = self.rng.choices(list(steps), list(steps.values()))[0]
        if not step(story):
            self.scene(story)

    def find(self, story: Story, finder: str, thing: str, finders: Sequence[str]) -> None:
        """`finder`, one of `finders`, comes by `thing`, which is new to the story."""
        adjective = "" if self.rng.random() < 0.5 else f"{self.rng.choice(ADJECTIVES)} "
        phrase = with_article(adjective + thing)
        fitting = [other for other in OBJECTS if other not in story.holder and self.may_own(finder, other)]
        if not adjective:
            fitting = [other for other in fitting if article(other) == article(thing)]
        story.say(self.frame(Event.FIND), {"a": finders}, a=finder, thing=phrase)
        story.choose(story.object_seen[thing], *([thing] if thing in story.asked else fitting))

    def new_object(self, story: Story) -> bool:
        """Somebody finds an object that the story does not have yet."""
        finder = self.rng.choice(story.cast)
        for thing in self.rng.sample(OBJECTS, len(OBJECTS)):
            if thing not in story.holder and self.may_own(finder, thing):
                self.find(story, finder, thing, story.cast)
                return True
        return False

    def hand_over(self, story: Story) -> bool:
        """An object is talked about and changes hands."""
        thing = self.pick(story)
        giver = story.holder[thing]
        takers = [name for name in story.cast if name != giver]
        fitting = [name for name in takers if self.may_own(name, thing)]
        if self.split == "held_out":
            fitting = fitting or takers  # a held-out story may fall back on known pairs; only new ones are asked about
        if not fitting:
            return False
        self.topic(story, thing)
        event = Event.GIVE if self.rng.random() < 0.6 else Event.TAKE
        story.say(self.frame(event), {"b": fitting, "o": [thing]}, a=giver, b=self.rng.choice(fitting), o=thing)
        return True

    def pick(self, story: Story) -> str:
        """An object that the story is busy with."""
        return self.rng.choice(self.busy(story))

    def busy(self, story: Story) -> list[str]:
        """The objects that the story is busy with."""
        return list(story.holder)[-story.busy :]

    def either(self, story: Story, a: str) -> dict[str, Sequence[str]]:
        """What two different characters are drawn from, the first of them being `a`."""
        return {"a": story.cast, "b": [name for name in story.cast if name != a]}

    def topic(self, story: Story, thing: str = "") -> bool:
        """Somebody, or nobody, says something about an object."""
        a, b = self.two(story)
        options = self.either(story, a) | {"o": self.busy(story)}
        story.say(self.frame(Event.TOPIC), options, a=a, b=b, o=thing or self.pick(story))
        return True

    def recap(self, story: Story) -> bool:
        """The narrator asks who has an object, and says it."""
        thing = self.pick(story)
        story.say(self.frame(Event.RECAP), {"o": self.busy(story)}, a=story.holder[thing], o=thing)
        return True

    def move(self, story: Story) -> bool:
        """A character goes to a place where it is not already."""
        mover = self.rng.choice(story.cast)
        places = [place for place in PLACES if place != story.place.get(mover)]
        story.say(self.frame(Event.MOVE), {"a": story.cast, "p": places}, a=mover, p=self.rng.choice(places))
        return True

    def mood(self, story: Story) -> bool:
        """A character feels or does something."""
        a, b = self.two(story)
        story.say(self.frame(Event.MOOD), self.either(story, a), a=a, b=b)
        return True

    def scene(self, story: Story) -> bool:
        """The weather."""
        story.say(self.frame(Event.SCENE))
        return True

    def two(self, story: Story) -> tuple[str, str]:
        """Two different characters."""
        a, b = self.rng.sample(story.cast, 2)
        return a, b
