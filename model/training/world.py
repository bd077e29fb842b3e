"""The world of the stories: who lives in it, what can be found there, and which pairs are kept out of training.

Pools are large on purpose. With three hundred names and a fresh cast for every story, neither guessing inside the cast
nor remembering who usually owns what pays: the only way to know who has the lantern is to look it up in the text.
"""

from functools import cache
from hashlib import blake2b

NAMES = tuple(
    """
    Ada Adam Agnes Aiden Alba Albert Alfie Alice Alma Alvin Amber Amos Amy Andy Angus Anna Anton Archie Arlo Arthur
    Astrid Axel Barney Basil Beatrice Becky Bella Ben Bertha Bess Betty Billy Blake Bobby Boris Bruno Caleb Callum Carla
    Carmen Casper Cecil Celia Chester Chloe Clara Claude Cleo Colin Conrad Cora Cyril Daisy Damian Dan Daphne Darla Dean
    Delia Derek Dexter Dinah Dolly Dora Doris Duncan Dylan Earl Eddie Edgar Edith Edna Edwin Eli Elias Eliza Ella Elmer
    Elsie Emil Emma Enid Enzo Eric Ernest Esme Ethan Eva Ezra Fanny Felix Fern Fergus Finn Fiona Flora Floyd Frances
    Frank Freya Fritz Gavin Gemma George Gerda Gilbert Gina Glenda Gloria Gordon Greta Gus Gwen Hal Hannah Harold Harry
    Harvey Hattie Hazel Hector Heidi Helga Henry Herman Hilda Homer Hugo Ian Ida Igor Ingrid Irene Iris Isaac Isla Ivan
    Ivy Jack Jacob Jade James Jane Jasper Jenny Jesse Jill Joan Joel Jonas Josie Judy Julia Julius June Kara Karl Kate
    Keith Kevin Kiki Kirk Klara Kurt Lana Lars Laura Leah Lena Leo Leon Lewis Liam Lily Linda Linus Lionel Lola Lorna
    Lottie Louis Lucy Luke Luna Lydia Mabel Magda Manny Marcus Margot Maria Martha Martin Matilda Max Maya Megan Mia
    Mildred Milo Mina Mira Molly Mona Monty Morris Myra Nadia Nancy Naomi Ned Nell Nick Nigel Nina Noah Nora Norman
    Olga Olive Oliver Ollie Omar Oscar Otis Otto Owen Paula Pearl Pedro Peggy Penny Percy Petra Phil Phoebe Pippa Polly
    Quentin Rachel Ralph Ramona Ray Rex Rita Robin Roger Roland Romeo Rosa Rosie Roy Ruby Rufus Rupert Ruth Sadie Sally
    Sam Sandy Sara Seth Sheila Sid Silas Simon Sofia Sonia Stan Stella Susan Sven Sylvia Tara Ted Tess Thea Theo
    Thomas Tilda Tim Tina Toby Tom Tony Tracy Trudy Ursula Vera Victor Vince Viola Violet Wally Walter Wanda Wendy
    Wilbur Wilma Winnie Yvonne Zack Zara Zelda Zoe
    """.split()
)

KINDS = tuple(
    """
    actor badger baker bear beaver boy cat clown cook crow deer dog donkey dragon duck dwarf eagle elf farmer fisher fox
    frog gardener ghost giant girl goat goose hare hedgehog hunter king knight lamb lion lizard miller mole monkey mouse
    nurse otter owl panda parrot penguin pig pirate poet prince princess queen rabbit robot sailor scout seal shepherd
    singer sparrow squirrel swan tailor teacher tiger toad turtle weaver witch wizard wolf
    """.split()
)

OBJECTS = tuple(
    """
    acorn anchor anvil apple arrow axe bag balloon banner basket bell belt blanket book boot bottle bowl bracelet brick
    broom brush bucket button cake candle cap card carpet chain chair cherry clock cloak coat coin comb compass cookie
    crown cup dagger diamond doll drum egg engine fan feather fiddle flag flute fork gem glove goblet guitar hammer harp
    hat helmet hive hook horn jacket jar jewel jug kettle key kite knife ladder lamp lantern leaf lemon letter locket
    lute magnet map marble mask medal melon mirror mitten mug nail necklace needle net nut oar onion orange paddle paint
    parcel peach pear pebble pen pencil pillow pipe plate plum poem potato pot pumpkin puppet purse puzzle quilt radio
    rattle ribbon ring rope rug sack saddle sandal saw scarf seed shawl shell shield shovel skate sled slipper spade
    spoon stamp stick stool sword table teapot tent ticket torch towel toy trumpet umbrella vase violin wagon wallet
    wand watch wheel whistle spool
    """.split()
)

ADJECTIVES = tuple(
    """
    ancient big black blue bright broken brown clean clever cold crooked curious dark dirty dusty empty fancy fine
    funny gentle golden gray green heavy huge little long lovely lucky magic narrow new odd old pale pink
    plain pretty purple red rough round rusty sharp shiny silver simple small smooth soft special strange striped sturdy
    tiny ugly unusual useful warm white wide wooden yellow
    """.split()
)

PLACES = tuple(
    """
    airport bakery barn bay beach bridge cabin camp canal castle cave cellar chapel church circus cliff coast cottage
    courtyard desert dock farm field forest fort fountain garden gate glen hall harbor hill hotel house inn island
    jungle kitchen lagoon lake library lighthouse market meadow mill mine monastery mountain museum orchard palace park
    pond port quarry river road school shed shop shrine square stable station stream swamp temple theater tower town
    valley village vineyard waterfall well wharf windmill zoo
    """.split()
)

# One pair in HELD_OUT_SHARE never owns its object in any training document.
HELD_OUT_SHARE = 8


@cache  # of some fifty thousand pairs; a story asks about hundreds
def held_out(name: str, thing: str) -> bool:
    """Whether the pair is kept for evaluation. A property of the pair alone, so no seed can leak it into training."""
    digest = blake2b(f"{name}/{thing}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0


def article(word: str) -> str:
    """`a` or `an`, by the sound of the word that follows."""
    if word == "useful":  # spelled with a vowel, spoken with a consonant; the only such word of this world
        return "a"
    return "an" if word[0] in "aeiou" else "a"


def with_article(phrase: str) -> str:
    """`fox` -> `a fox`, `old fox` -> `an old fox`."""
    return f"{article(phrase.split(' ')[0])} {phrase}"
