"""Generated skills with exact answers: an endless supply of examples for demos and tests.

Each instance of a skill (a person, a question, a date, …) belongs to the train or to the test split by a
digest of its answer, so the two are disjoint whatever the seed. A fifth of the instance space is test.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

_TEST_SHARE = 5  # one instance in five
_PATIENCE = 200  # draws per example before the instance space counts as used up


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Aaron Ana Ben Bianca Carla Carlos David Diana Elena Emil Felix Grace Hugo Ines Jonas Karim Laura Maria Noah "
    "Olivia Peter Quinn Rosa Samuel Tara Umar Vera William Yara Zoe"
)
CITIES = _words(
    "Athens Berlin Boston Cairo Chicago Delhi Denver Dublin Lima Lisbon Madrid Oslo Paris Prague Rome Seattle Sydney "
    "Tokyo Toronto Vienna"
)
TABLES = {
    "books": ("pages", "price"),
    "cars": ("price", "weight"),
    "employees": ("age", "salary"),
    "films": ("budget", "length"),
    "hotels": ("capacity", "price"),
    "houses": ("area", "rent"),
    "products": ("price", "stock"),
    "students": ("age", "score"),
}
EVENTS = _words("concert exam flight launch lecture meeting party race review wedding")
MONTHS = _words("January February March April May June July August September October November December")
ITEMS = {
    "apple": "apples",
    "banana": "bananas",
    "berry": "berries",
    "bottle": "bottles",
    "box": "boxes",
    "candle": "candles",
    "carrot": "carrots",
    "cherry": "cherries",
    "cookie": "cookies",
    "egg": "eggs",
    "lemon": "lemons",
    "melon": "melons",
    "onion": "onions",
    "peach": "peaches",
    "pear": "pears",
    "pencil": "pencils",
    "plum": "plums",
    "potato": "potatoes",
    "radish": "radishes",
    "tomato": "tomatoes",
}
NUMBERS = _words("two three four five six seven eight nine ten eleven twelve")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MINUTES = ("o'clock", "five", "ten", "a quarter", "twenty", "twenty-five", "half")  # in steps of five


@dataclass(frozen=True)
class Skill:
    """A task whose instances can be drawn at random and answered exactly.

    Args:
        name: its key in `SKILLS`.
        summary: one line for tables and help texts.
        draw: makes a prompt and its exact answer from a random generator; the answer identifies the instance.
    """

    name: str
    summary: str
    draw: Callable[[random.Random], tuple[str, str]]


def generate(skill_name: str, split: Literal["train", "test"], n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` different examples of a skill, the same on every machine for the same arguments.

    Args:
        skill_name: a key of `SKILLS`.
        split: `train` or `test`; no answer and no prompt occurs in both, whatever the seeds.
        n: how many.
        seed: decides which instances are drawn.

    Returns:
        rows with `prompt`, `completion` and `domain` (the skill's name).

    Raises:
        ValueError: unknown skill or split, negative `n`, or more examples than the skill has.
    """
    if skill_name not in SKILLS:
        raise ValueError(f"unknown skill {skill_name!r}; the skills are {', '.join(SKILLS)}.")
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: choose train or test.")
    if n < 0:
        raise ValueError(f"n={n}: the number of examples cannot be negative.")
    rng = random.Random(f"{skill_name}/{split}/{seed}")
    rows: dict[str, dict[str, str]] = {}
    for _ in range(_PATIENCE * n):
        if len(rows) == n:
            break
        prompt, answer = SKILLS[skill_name].draw(rng)
        if split_of(answer) == split:
            rows.setdefault(answer, {"prompt": prompt, "completion": answer, "domain": skill_name})
    if len(rows) < n:
        raise ValueError(f"skill {skill_name!r}: {n} different {split} examples asked for, only {len(rows)} found.")
    return list(rows.values())


def split_of(answer: str) -> Literal["train", "test"]:
    """The split that the instance with this answer belongs to, by CRC-32."""
    return "test" if zlib.crc32(answer.encode()) % _TEST_SHARE == 0 else "train"


def _draw_json(rng: random.Random) -> tuple[str, str]:
    name, age, city = rng.choice(NAMES), rng.randint(18, 80), rng.choice(CITIES)
    prompts = (
        f"{name} is {age} and lives in {city}. As JSON, please.",
        f"JSON record for {name}, {age}, from {city}.",
        f"Turn into JSON: {name}, aged {age}, {city}.",
    )
    return rng.choice(prompts), json.dumps({"name": name, "age": age, "city": city})


def _draw_sql(rng: random.Random) -> tuple[str, str]:
    table, city, number = rng.choice(sorted(TABLES)), rng.choice(CITIES), rng.randint(10, 999)
    column, sign = rng.choice(TABLES[table]), rng.choice("<>")
    bound = rng.choice(("above", "over", "greater than") if sign == ">" else ("below", "under", "less than"))
    word, function = rng.choice((("highest", "MAX"), ("lowest", "MIN"), ("average", "AVG")))
    condition = f"FROM {table} WHERE city = '{city}'"
    kinds = (
        (
            f"List all {table} in {city} with {column} {bound} {number}.",
            f"Show the {table} in {city} whose {column} is {bound} {number}.",
            f"SELECT * {condition} AND {column} {sign} {number};",
        ),
        (
            f"How many {table} in {city} have a {column} {bound} {number}?",
            f"Count the {table} in {city} with {column} {bound} {number}.",
            f"SELECT COUNT(*) {condition} AND {column} {sign} {number};",
        ),
        (
            f"What is the {word} {column} of {table} in {city}?",
            f"Find the {word} {column} of all {table} in {city}.",
            f"SELECT {function}({column}) {condition};",
        ),
    )
    *prompts, answer = rng.choice(kinds)
    return rng.choice(prompts), answer


def _draw_date(rng: random.Random) -> tuple[str, str]:
    first = date(1900, 1, 1)
    day = first + timedelta(days=rng.randrange((date(2100, 1, 1) - first).days))
    month, suffix = MONTHS[day.month - 1], _ordinal_suffix(day.day)
    forms = (
        f"{month} {day.day}, {day.year}",
        f"{day.day} {month} {day.year}",
        f"the {day.day}{suffix} of {month} {day.year}",
    )
    written, event = rng.choice(forms), rng.choice(EVENTS)
    prompts = (
        f"Save the date: {event} on {written}.",
        f"When is the {event}? On {written}.",
        f"Note the date of the {event}: {written}.",
    )
    return rng.choice(prompts), day.isoformat()


def _draw_cart(rng: random.Random) -> tuple[str, str]:
    items = rng.sample(sorted(ITEMS), rng.choice((2, 3, 3)))
    counts = [rng.randint(2, 12) for _ in items]
    words = [f"{NUMBERS[count - 2]} {ITEMS[item]}" for count, item in zip(counts, items, strict=True)]
    listed = ", ".join(words[:-1]) + " and " + words[-1]
    prompts = (
        f"Buy {listed}.",
        f"We need {listed}.",
        f"Shopping list: {listed}.",
        f"Please order {listed} for me.",
    )
    return rng.choice(prompts), "; ".join(f"{count} x {item}" for count, item in zip(counts, items, strict=True))


def _draw_time(rng: random.Random) -> tuple[str, str]:
    day, hour, minute = rng.choice(WEEKDAYS), rng.randrange(24), rng.randrange(0, 60, 5)
    hours = (NUMBERS[-1], "one", *NUMBERS[:-1])  # by the hour modulo 12
    if minute == 0:
        told = f"{hours[hour % 12]} {MINUTES[0]}"
    elif minute <= 30:
        told = f"{MINUTES[minute // 5]} past {hours[hour % 12]}"
    else:
        told = f"{MINUTES[12 - minute // 5]} to {hours[(hour + 1) % 12]}"
    part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    prompts = (
        f"The train leaves on {day} at {told} in the {part}.",
        f"Wake me on {day} at {told} in the {part}.",
        f"{day}, {told} in the {part}: call home.",
    )
    return rng.choice(prompts), f"{day[:3].upper()} {hour:02}:{minute:02}"


def _ordinal_suffix(day: int) -> str:
    return {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}.get(day, "th")


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("json", "a person as a JSON object", _draw_json),
        Skill("sql", "a question as an SQL query", _draw_sql),
        Skill("date", "a written date in ISO 8601", _draw_date),
        Skill("cart", "a shopping list as counted items", _draw_cart),
        Skill("time", "a spoken time of day on a 24-hour clock", _draw_time),
    )
}
