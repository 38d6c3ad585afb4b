"""Questions of levels 1 to 100, made from a seed: four options each, one of them right, and no data from outside.

Four families take turns, so that no single skill is the level; in each of them a number grows with the level:

  sum         "1 + 1 = 2\\n2 + 3 = 5\\n48 + 27 ="   larger numbers, then more of them
  sequence    "7, 12, 17, 22,"                     larger numbers and steps, then steps that grow, then growth that grows
  letters     "The letters: B, D, F, H, J,"        longer steps, then steps that grow, then two sequences in turn
  words       "The list: cow, cat, cow, cat, cow," longer lists, twice and again, then forwards and backwards

Level 1 is counting, adding ones, the alphabet and one word again and again: a model of 135 M parameters does it.  At level
100 five numbers of seven digits are to be added in the head.  Wrong options are near the right one and as long as it is;
guessing gives a quarter.
"""

from __future__ import annotations

import random
import string
from typing import NamedTuple

from ..errors import BadInput

LEVELS = range(1, 101)
OPTIONS = 4
CHANCE = 1 / OPTIONS
WORDS = (
    *("dog", "cat", "fox", "cow", "bear", "wolf", "fish", "bird"),
    *("horse", "mouse", "sheep", "goat", "lion", "tiger", "frog", "duck"),
)


class Question(NamedTuple):
    """prompt: what stands before the answer.  options: OPTIONS texts that could follow.  answer: index of the right one."""

    family: str
    level: int
    prompt: str
    options: tuple[str, ...]
    answer: int


def questions(level: int, count: int, seed: int = 0) -> list[Question]:
    """`count` questions of a level, the families in turn.  The first are the same, however many are asked for.

    Raises BadInput for a level, a count or a seed out of range.
    """
    if level not in LEVELS or count < 1 or seed < 0:
        raise BadInput(f"level={level}, count={count}, seed={seed}; expected a level of 1 to 100, a count >= 1, a seed >= 0")
    made = []
    for i in range(count):
        family = list(_FAMILIES)[i % len(_FAMILIES)]
        draw = random.Random(f"{family} {level} {seed} {i}")  # a text's hash is the same on every machine
        prompt, right, wrong = _FAMILIES[family](level, draw)
        options = [right, *wrong]
        draw.shuffle(options)
        made.append(Question(family, level, prompt, tuple(options), options.index(right)))
    return made


_Parts = tuple[str, str, list[str]]  # prompt, right option, wrong ones


def _sum(level: int, draw: random.Random) -> _Parts:
    largest = round(2.5 * 10 ** (level / 15))
    numbers = [draw.randint(1, largest) for _ in range(2 + level // 30)]
    total = sum(numbers)
    return f"1 + 1 = 2\n2 + 3 = 5\n{' + '.join(map(str, numbers))} =", f" {total}", _near(total, draw)


def _sequence(level: int, draw: random.Random) -> _Parts:
    """A polynomial: of degree 1 below level 40, of degree 2 below 80, then of degree 3."""
    degree = 1 + level // 40
    differences = [draw.randint(1, 3 + round(10 ** (level / 30)))]
    differences += [draw.randint(1, 1 + round(level**1.5 / 60)) for _ in range(degree)]
    shown = []
    for _ in range(4 + degree):
        shown.append(differences[0])
        differences = [a + b for a, b in zip(differences, [*differences[1:], 0], strict=True)]
    *before, right = shown
    return ", ".join(map(str, before)) + ",", f" {right}", _near(right, draw)


def _letters(level: int, draw: random.Random) -> _Parts:
    """Places in the alphabet: steps of one length; from level 40 on steps that grow; from 70 on two sequences in turn."""
    if level < 40:
        step = draw.randint(1 + level // 24, 1 + level // 12)
        places = [step * i for i in range(6)]
    elif level < 70:
        step, growth = draw.randint(1, 2), draw.randint(1, level // 35)
        places = [step * i + growth * i * (i - 1) // 2 for i in range(5)]
    else:
        one, two = draw.sample(range(1, 6), 2)
        apart = draw.randint(1, 5)
        places = [step * i + start for i in range(4) for step, start in ((one, 0), (two, apart))][:7]
    start = draw.randrange(min(26 - max(places), 1 + level // 2))
    *before, right = [start + place for place in places]
    # The letter after the last one shown is not a wrong option: if steps are longer, a weak model would be below chance.
    near = [at for at in range(max(0, right - 5), min(26, right + 6)) if at not in (right, before[-1] + 1)]
    wrong = draw.sample(near, OPTIONS - 1)
    text = [string.ascii_uppercase[at] for at in (*before, right, *wrong)]
    cut = len(before)
    return f"The letters: {', '.join(text[:cut])},", f" {text[cut]}", [f" {letter}" for letter in text[cut + 1 :]]


def _words(level: int, draw: random.Random) -> _Parts:
    """A list of words twice, and again; from level 40 on it is read forwards, and then backwards."""
    length = 1 + level // 8 if level < 40 else level // 10
    words = draw.sample(WORDS, max(length, OPTIONS))
    listed = words[:length]
    if level < 40:
        at = draw.randrange(length)
        shown, right = [*listed * 2, *listed[:at]], listed[at]
    else:
        at = draw.randrange(1, length)
        shown, right = [*listed, *listed[: at - 1 : -1]], listed[at - 1]
    wrong = draw.sample([word for word in words if word != right], OPTIONS - 1)
    return f"The list: {', '.join(shown)},", f" {right}", [f" {word}" for word in wrong]


def _near(right: int, draw: random.Random) -> list[str]:
    """Three other numbers of as many digits, which with the right one make an arithmetic sequence: it may be any of them."""
    digits = len(str(right))
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits - 1
    unit = 10 ** draw.randrange(max(1, digits - 1))
    first = [right - place * unit for place in range(OPTIONS)]
    start = draw.choice([f for f in first if low <= f and f + (OPTIONS - 1) * unit <= high])
    return [f" {number}" for i in range(OPTIONS) if (number := start + i * unit) != right]


_FAMILIES = {"sum": _sum, "sequence": _sequence, "letters": _letters, "words": _words}
