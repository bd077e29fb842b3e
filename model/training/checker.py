"""Reads a story back by the rules it was written by: every sentence known, every character introduced, every gift held.

The frames are compiled into one pattern each; a story is parsed from left to right and replayed on a small world of its
own. Nothing here knows about models: the generator's stories and a model's are judged alike.
"""

import re
from dataclasses import dataclass, field
from functools import cache

from model.training.frames import COUNTS, FRAMES, Event, Frame, friends_phrase
from model.training.world import ADJECTIVES, KINDS, NAMES, OBJECTS, PLACES, with_article


@dataclass(frozen=True)
class Verdict:
    """Whether a story is well-formed, and if not, the first thing that is wrong with it."""

    ok: bool
    reason: str = ""


class FlawError(Exception):
    """A sentence that breaks a rule."""


@dataclass
class World:
    """What the story has said so far."""

    cast: list[str] = field(default_factory=list)
    holder: dict[str, str] = field(default_factory=dict)
    place: dict[str, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)


def one_of(words: tuple[str, ...]) -> str:
    """A pattern for any of the words, longest first."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


@cache
def slot_patterns() -> dict[str, str]:
    """What may stand in each slot."""
    name, thing = f"(?:{one_of(NAMES)})", f"(?:{one_of(OBJECTS)})"
    return {
        "a": name,
        "b": name,
        "o": thing,
        "p": one_of(PLACES),
        "who": f"an? (?:{one_of(KINDS)})",
        "thing": f"an? (?:(?:{one_of(ADJECTIVES)}) )?{thing}",
        "friends": f"(?:{one_of(COUNTS)}), {name}(?:, {name})*(?: and {name})?",
    }


def pattern(frame: Frame) -> re.Pattern[str]:
    """The frame as a pattern with one group for each slot; a slot that returns must repeat itself."""
    parts: list[str] = []
    seen: set[str] = set()
    for literal, slot in frame.pieces:
        parts.append(re.escape(literal))
        if slot:
            parts.append(f"(?P={slot})" if slot in seen else f"(?P<{slot}>{slot_patterns()[slot]})")
            seen.add(slot)
    return re.compile("".join(parts) + r"(?= |$)")


@cache
def grammar() -> tuple[tuple[Event, re.Pattern[str]], ...]:
    """Every frame's pattern, longest template first so that no sentence is read as the start of another."""
    frames = sorted((frame for frames in FRAMES.values() for frame in frames), key=lambda f: -len(f.template))
    return tuple((frame.event, pattern(frame)) for frame in frames)


def check(story: str) -> Verdict:
    """Judge one story, from its opening to `The end.`"""
    world = World()
    rest = story
    try:
        while rest:
            event, match = parse(rest)
            follow(world, event, match.groupdict())
            rest = rest[match.end() :].removeprefix(" ")
        demand(bool(world.events) and world.events[-1] is Event.ENDING, "the story has no ending")
    except FlawError as flaw:
        return Verdict(False, str(flaw))
    return Verdict(True)


def parse(text: str) -> tuple[Event, re.Match[str]]:
    """The frame that the text begins with. Raises `FlawError` where no frame fits."""
    for event, expression in grammar():
        if match := expression.match(text):
            return event, match
    raise FlawError(f"no sentence of this world: {text[:60]!r}")


def demand(condition: bool, complaint: str) -> None:
    """Raise `FlawError` with the complaint unless the condition holds."""
    if not condition:
        raise FlawError(complaint)


def follow(world: World, event: Event, slots: dict[str, str]) -> None:
    """Let one sentence happen. Raises `FlawError` where it may not."""
    check_order(world, event)
    if event is Event.OPENING:
        demand(slots["who"] == with_article(slots["who"].split(" ")[-1]), f"wrong article: {slots['who']}")
        world.cast = [slots["a"]]
    for slot in ("a", "b"):
        demand(slot not in slots or slots[slot] in world.cast, f"{slots.get(slot)} was never introduced")
    demand("b" not in slots or slots["a"] != slots["b"], f"{slots.get('a')} meets {slots.get('b')}")
    demand("o" not in slots or slots["o"] in world.holder, f"nobody has found the {slots.get('o')} yet")

    match event:
        case Event.FRIENDS:
            introduce(world, slots["friends"])
        case Event.FIND:
            find(world, slots["a"], slots["thing"])
        case Event.GIVE | Event.TAKE | Event.RECAP:
            holder = world.holder[slots["o"]]
            demand(holder == slots["a"], f"{holder} has the {slots['o']}, not {slots['a']}")
            world.holder[slots["o"]] = slots.get("b", holder)
        case Event.MOVE:
            demand(world.place.get(slots["a"]) != slots["p"], f"{slots['a']} is already at the {slots['p']}")
            world.place[slots["a"]] = slots["p"]
        case _:
            pass
    world.events.append(event)


def check_order(world: World, event: Event) -> None:
    """A story opens once, first; its friends come next, then the first find; nothing follows its ending."""
    position = len(world.events)
    demand((event is Event.OPENING) == (position == 0), "the opening stands first, and once")
    demand(event is not Event.FRIENDS or position == 1, "friends are introduced after the opening")
    demand(position != 2 or event is Event.FIND, "the hero finds something first")
    demand(Event.ENDING not in world.events, "the story goes on after its ending")


def introduce(world: World, friends: str) -> None:
    """Add the friends to the cast: as many as announced, all different."""
    names = re.findall(one_of(NAMES), friends.split(", ", 1)[1])
    demand(len(names) <= len(COUNTS) and friends == friends_phrase(names), f"miscounted friends: {friends}")
    world.cast += names
    demand(len(set(world.cast)) == len(world.cast), f"a friend twice: {friends}")


def find(world: World, finder: str, phrase: str) -> None:
    """Give a new object to its finder."""
    _, rest = phrase.split(" ", 1)
    thing = rest.split(" ")[-1]
    demand(phrase == with_article(rest), f"wrong article: {phrase}")
    demand(thing not in world.holder, f"there is a {thing} already")
    world.holder[thing] = finder
