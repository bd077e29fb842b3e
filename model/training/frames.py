"""The sentences of the stories, as data. The generator fills them, the checker parses them: both read this one list.

Slots: `{a}`, `{b}` are characters, `{o}` is an object already in the story, `{thing}` a new object with its article and
perhaps an adjective, `{p}` a place, `{who}` a kind of character with its article, `{friends}` a list of characters.

One rule binds objects to owners, everywhere: an object belongs to the nearest name before it in its sentence, and a
mention without a name before it changes nothing. English allows this, and attention can learn it in a single layer.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class Event(StrEnum):
    """What a sentence does to the world."""

    OPENING = "opening"  # introduces the hero
    FRIENDS = "friends"  # introduces the rest of the cast
    FIND = "find"  # a new object comes into the story
    TOPIC = "topic"  # an object is talked about; nothing changes
    GIVE = "give"  # a, who holds it, gives o to b
    TAKE = "take"  # b gets o from a, who holds it
    RECAP = "recap"  # the narrator asks and answers who has o
    MOVE = "move"  # a goes to a place
    MOOD = "mood"  # someone does something that leaves the world as it is
    SCENE = "scene"  # nobody does anything
    ENDING = "ending"


@dataclass(frozen=True)
class Frame:
    """One sentence, or two that belong together."""

    event: Event
    template: str

    @cached_property
    def pieces(self) -> tuple[tuple[str, str], ...]:
        """(literal, slot) pairs in the order of the text; the last slot is empty."""
        parts = re.split(r"\{(\w+)\}", self.template)
        return tuple(zip(parts[::2], [*parts[1::2], ""], strict=True))


SENTENCES: dict[Event, str] = {
    Event.OPENING: """
        Once upon a time there was {who} named {a}.
        Once upon a time there lived {who} called {a}.
        Long ago there was {who} whose name was {a}.
        This is the story of {who} named {a}.
    """,
    Event.FRIENDS: """
        {a} had {friends}.
        {a} lived with {friends}.
        {a} loved to play with {friends}.
        {a} often met {friends}.
    """,
    Event.FIND: """
        {a} found {thing}.
        One day {a} found {thing} in the grass.
        {a} made {thing}.
        {a} bought {thing} for a penny.
        One morning {a} picked up {thing}.
        {a} opened a box and found {thing}.
        {a} dug a hole and found {thing}.
        Then {a} won {thing} in a game.
        The next day {a} found {thing} under a tree.
        A stranger gave {a} {thing}.
        {a} looked behind a stone and saw {thing}.
    """,
    Event.TOPIC: """
        The {o} was very heavy.
        The {o} was good to look at.
        Everyone talked about the {o}.
        Everyone loved the {o}.
        "What a nice {o}!" said {a}.
        "I like the {o}," said {a}.
        "Look at the {o}!" said {a} to {b}.
        Nobody wanted to lose the {o}.
        Then it was time to share the {o}.
        How pretty the {o} was!
        There was something strange about the {o}.
    """,
    Event.GIVE: """
        So {a} gave {b} the {o}.
        So {a} handed {b} the {o}.
        So {a} lent {b} the {o}.
        So {a} kindly gave {b} the {o}.
        So {a} smiled and gave {b} the {o}.
        So {a} brought {b} the {o}.
        So {a} passed the time with {b} and gave {b} the {o}.
    """,
    Event.TAKE: """
        But {b} took the {o} from {a}.
        But {b} borrowed the {o} from {a}.
        But {b} bought the {o} from {a}.
        But {b} asked for the {o} and got it from {a}.
        But {b} won the {o} from {a} in a race.
        But {b} wanted the {o} and took it from {a}.
    """,
    Event.RECAP: """
        Who had the {o}? Now {a} had the {o}.
        And who had the {o} now? It was {a} who had the {o}.
    """,
    Event.MOVE: """
        {a} went to the {p}.
        Then {a} walked to the {p}.
        {a} ran all the way to the {p}.
        Soon {a} came to the {p}.
        After that {a} went back to the {p}.
        {a} took a walk to the {p}.
        The next day {a} went to see the {p}.
    """,
    Event.MOOD: """
        {a} smiled.
        {a} laughed and {b} laughed too.
        {a} was very happy.
        {a} was tired and sat down.
        {a} was hungry and ate some bread.
        {a} sang a song for {b}.
        {a} waved to {b}.
        {a} told {b} a secret.
        {a} and {b} danced together.
        Then {a} took a nap.
        {a} thought about it for a while.
        "Good morning!" said {a} to {b}.
        "I am so happy," said {a}.
        Later {a} helped {b} with the work.
        {a} could hardly wait.
    """,
    Event.SCENE: """
        The sun was shining.
        It began to rain.
        The wind blew and the leaves danced.
        Birds were singing in the trees.
        The day went by.
        Night came and the stars came out.
        It was a cold day.
        All was quiet.
    """,
    Event.ENDING: """
        In the end everyone went home. The end.
        And they all lived happily ever after. The end.
        They stayed friends for ever. The end.
        That night everyone slept well. The end.
        And that is how the story goes. The end.
    """,
}

FRAMES: dict[Event, tuple[Frame, ...]] = {
    event: tuple(Frame(event, line.strip()) for line in lines.strip().splitlines())
    for event, lines in SENTENCES.items()
}

COUNTS = ("one friend", "two friends", "three friends", "four friends", "five friends")


def friends_phrase(names: list[str]) -> str:
    """`three friends, Mia, Tom and Ella`."""
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{COUNTS[len(names) - 1]}, {listed}"
