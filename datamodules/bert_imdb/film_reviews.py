"""English film reviews from a grammar, whose label is in the order of the words and hardly in the words.

Every sentence of opinion leans to one side, and what makes it lean is never one word:

- a word of praise or of blame, which is denied in three of ten cases: "the acting is far from wooden";
- a claim that is disowned: "do not believe those who say that the score is inventive";
- a concession, beside which the opposite decides: "although the pace is deft, the script bored me";
- two words that change places: "its faults outweigh its strengths".

What decides is on the side of the review's label in all of its sentences; a concession is on the other side. Where a
review leans follows from reading it, and four of ten reviews give both sides room.
"""

import random
from collections.abc import Iterator, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.bert_imdb.reviews import Review, ReviewSource, Side

DENIED = 0.3  # of the plain opinions; at one half, counting words would be of no use at all
MIXED = 0.4  # of the reviews hold concessions


def _listed(words: str) -> list[str]:
    return words.split(", ")


# What is said of a part of the film, by the side that it speaks for: [against, for].
_ADJECTIVES = (
    _listed(
        "dull, clumsy, lazy, hollow, stale, shallow, tired, muddled, wooden, flat, careless, tedious, crude, "
        "lifeless, sloppy, pompous, dreary, bland, forgettable, stiff"
    ),
    _listed(
        "gripping, warm, inventive, sharp, graceful, honest, lively, subtle, moving, assured, witty, tender, "
        "fresh, convincing, elegant, polished, memorable, vivid, deft, rich"
    ),
)
# Verbs: what it did to me, and what it did not do.
_VERBS = (
    [("bored", "bore"), ("annoyed", "annoy"), ("wearied", "weary"), ("irritated", "irritate"), ("lost", "lose")],
    [("charmed", "charm"), ("moved", "move"), ("delighted", "delight"), ("thrilled", "thrill"), ("amused", "amuse")],
)
# Sentences of two halves, one for each side: which of the two comes first decides.
_PAIRS = (
    ("bad", "good", "it is a {0} film with a {1} poster"),
    ("badly", "well", "it begins {1} and ends {0}"),
    ("sorry", "glad", "it left me more {0} than {1}"),
    ("faults", "strengths", "its {0} outweigh its {1}"),
    ("hated", "loved", "the friend beside me {1} it, and I {0} it"),
    ("wasted", "well spent", "the ticket seemed {1} and was {0}"),
    ("leave early", "see it twice", "I would {0} rather than {1}"),
    ("boredom", "delight", "I went in expecting {1} and found {0}"),
)
_PARTS = _listed(
    "the acting, the script, the score, the camera work, the ending, the dialogue, the editing, the pace, "
    "the opening, the second half, the leading man, the heroine, the villain, the love story, the "
    "lighting, the humour"
)
_SAYS = (
    "{part} is {word}",
    "{part} is {degree} {word}",
    "I found {part} {word}",
    "{part} turns out to be {word}",
    "{part} stays {word} to the last",
    "anybody would call {part} {word}",
)
_DENIES = (
    "{part} is not {word}",
    "{part} is far from {word}",
    "{part} is anything but {word}",
    "I never found {part} {word}",
    "{part} is hardly ever {word}",
    "nobody would call {part} {word}",
)
_DISOWNS = (
    "do not believe those who say that {claim}",
    "it is simply untrue that {claim}",
    "I cannot agree that {claim}",
)
_DEGREES = _listed("very, rather, quite, thoroughly, truly, remarkably")
# What decides, and what is conceded beside it; either may come first.
_CONTRASTS = (
    "{conceded}, but {decides}",
    "although {conceded}, {decides}",
    "{decides}, even if {conceded}",
    "it may be that {conceded}, and still {decides}",
    "what counts is that {decides}, not that {conceded}",
    "{decides}, which weighs more than that {conceded}",
)
_LINKS = ("", "", "", "And ", "Then again, ", "As far as I can tell, ", "To my mind, ", "All in all, ")
_OPENINGS = (
    'I saw "{title}" on {day}, with {company}.',
    '"{title}" is the {count} film by {name}.',
    'A word about "{title}".',
    "{name} made this one in {place}.",
    'Somebody gave me "{title}" for my birthday.',
    "We had two hours to spend, and this was on.",
)
_STORIES = (
    "It is the story of {who} who {does} in {place}.",
    "{name} plays {who}, and {who2} {does}.",
    "In {place}, {who} {does}, and everything follows from that.",
    "The first scene shows {place}, where {who} {does}.",
)
_DAYS = _listed("Monday, Tuesday, a rainy Sunday, my day off, a flight, New Year's Eve")
_COMPANY = _listed("my sister, two colleagues, an old friend, nobody else in the room, my father, the children")
_COUNTS = _listed("first, second, third, fourth, latest")
_PLACES = _listed(
    "a town by the sea, Lisbon, a village in the hills, a hotel out of season, the far north, a school "
    "for sailors, a city without trains, an empty theatre, a valley under snow, the suburbs"
)
_PEOPLE = _listed(
    "a lighthouse keeper, a retired judge, a young baker, a pair of twins, a piano tuner, a night nurse, "
    "a cartographer, a travelling salesman, a lost tourist, a beekeeper, a stage magician, a widow"
)
_DEEDS = _listed(
    "inherits a house, loses a letter, waits for a ship, follows a stranger, opens a shop, learns to "
    "swim, hides a painting, writes to the king, misses the last bus, buys a horse, keeps a secret, finds "
    "a map"
)
_FIRST_NAMES = _listed("Ines, Otto, Maren, Silvio, Greta, Pavel, Nadia, Hugo, Ilse, Tomas")
_LAST_NAMES = _listed("Halloran, Brandt, Okafor, Lindqvist, Marchetti, Duval, Petrov, Asante, Whitlock, Soares")
_TITLE_ADJECTIVES = _listed(
    "Silent, Blue, Second, Crooked, Paper, Northern, Hidden, Seventh, Golden, Distant, Narrow, Borrowed, "
    "Winter, Open, Iron"
)
_TITLE_NOUNS = _listed(
    "Harbour, Orchard, Staircase, Window, Compass, Garden, Platform, Lantern, Border, Bridge, Kitchen, "
    "Island, Violin, Mirror, Station, Meadow, Signal, Ferry, Balcony, Almanac"
)
_TITLES = [f"The {adjective} {noun}" for adjective in _TITLE_ADJECTIVES for noun in _TITLE_NOUNS]


class FilmReviews(ReviewSource):
    """Reviews that are made up, all different, in equal numbers for and against.

    There are 300 films, some of which are in validation and some in the test alone. The reviews are a function of the
    arguments; the first thousand of two thousand are the same as those of one thousand.

    Args:
        n_train: Reviews to train on, at least 2.
        n_val: Reviews to validate on, at least 2.
        n_test: Reviews to test on, at least 2.
        n_unlabelled: Further reviews of the training films, whose labels are not given; for pretraining.
        seed: Chooses the reviews.

    Raises:
        MisconfigurationException: If there are too few.
    """

    def __init__(
        self, n_train: int = 4000, n_val: int = 500, n_test: int = 2000, n_unlabelled: int = 0, seed: int = 0
    ) -> None:
        self.sizes = {"train": n_train, "val": n_val, "test": n_test}
        for side, n in self.sizes.items():
            if n < 2:
                raise MisconfigurationException(f"FilmReviews: n_{side} is {n}: it must be at least 2")
        self.n_unlabelled = n_unlabelled
        self.seed = seed

    def reviews(self, side: Side) -> Iterator[Review]:
        """Yields the reviews of one part."""
        return self._distinct(side, side, self.sizes[side])

    def unlabelled(self) -> Iterator[Review]:
        """Yields the reviews without labels."""
        return (
            Review(review.text, None, review.film, review.place)
            for review in self._distinct("unlabelled", "train", self.n_unlabelled)
        )

    def _distinct(self, part: str, side: Side, n: int) -> Iterator[Review]:
        draw = random.Random(f"{self.seed} {part}")
        films = films_of(side)
        seen: set[str] = set()
        while len(seen) < n:
            label, film = len(seen) % 2, draw.choice(films)
            text = write_review(draw, label, film)
            if text not in seen:
                seen.add(text)
                yield Review(text, label, film, f"FilmReviews, {part}, review {len(seen)}")


def films_of(side: Side) -> list[str]:
    """The films of one part: seven of ten are in training, one in validation, two in the test."""
    places = {"train": range(7), "val": range(7, 8), "test": range(8, 10)}[side]
    n = len(_TITLE_NOUNS)  # the words of a title are known from others: what is new is that they stand together
    return [title for i, title in enumerate(_TITLES) if (i // n + i % n) % 10 in places]


def write_review(draw: random.Random, label: int, film: str) -> str:
    """Writes one review.

    Args:
        draw: Makes all choices.
        label: 1 for the film, 0 against it.
        film: Its title.
    """
    mixed = draw.random() < MIXED
    sentences = [_opening(draw, film)]
    if draw.random() < 0.3:
        sentences.append(_story(draw))
    for _ in range(draw.randint(2, 4)):
        said = _contrast(draw, label) if mixed and draw.random() < 0.7 else _opinion(draw, label)
        link = draw.choice(_LINKS)
        sentences.append(f"{link}{said}." if link else f"{said[0].upper()}{said[1:]}.")
    if len(sentences) > 3:  # a second paragraph, as reviews from the web have it
        sentences[2] += "<br /><br />"
    return " ".join(sentences).replace("<br /> ", "<br />")


def _opinion(draw: random.Random, side: int) -> str:
    """Something that speaks for the film (1) or against it (0)."""
    if draw.random() < 0.25:
        *words, pattern = draw.choice(_PAIRS)
        return pattern.format(words[side], words[1 - side])
    if draw.random() < 0.15:
        return draw.choice(_DISOWNS).format(claim=_said_plainly(draw, 1 - side, denied=draw.random() < DENIED))
    return _said_plainly(draw, side, denied=draw.random() < DENIED)


def _said_plainly(draw: random.Random, side: int, denied: bool) -> str:
    part = draw.choice(_PARTS)
    word_side = 1 - side if denied else side
    if draw.random() < 0.2:
        did, do = draw.choice(_VERBS[word_side])
        return f"{part} did not {do} me" if denied else f"{part} {did} me"
    pattern = draw.choice(_DENIES if denied else _SAYS)
    return pattern.format(part=part, word=draw.choice(_ADJECTIVES[word_side]), degree=draw.choice(_DEGREES))


def _contrast(draw: random.Random, side: int) -> str:
    return draw.choice(_CONTRASTS).format(decides=_opinion(draw, side), conceded=_opinion(draw, 1 - side))


def _name(draw: random.Random) -> str:
    return f"{draw.choice(_FIRST_NAMES)} {draw.choice(_LAST_NAMES)}"


def _opening(draw: random.Random, film: str) -> str:
    return draw.choice(_OPENINGS).format(
        title=film,
        name=_name(draw),
        day=draw.choice(_DAYS),
        company=draw.choice(_COMPANY),
        count=draw.choice(_COUNTS),
        place=draw.choice(_PLACES),
    )


def _story(draw: random.Random) -> str:
    who, other = _two(draw, _PEOPLE)
    return draw.choice(_STORIES).format(
        who=who, who2=other, does=draw.choice(_DEEDS), place=draw.choice(_PLACES), name=_name(draw)
    )


def _two(draw: random.Random, words: Sequence[str]) -> tuple[str, str]:
    first, second = draw.sample(words, 2)
    return first, second
