"""The generated skills: the same everywhere, train and test apart, and the answers right.

The oracle reads the prompt as a person would and works the answer out again, without the generator's code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from dylora_moe.data import generated
from dylora_moe.data.generated import SKILLS, generate, split_of

N = 300


def answer_json(prompt: str) -> str:
    (age,) = re.findall(r"\d+", prompt)
    name, city = re.findall(r"[A-Z][a-z]+", re.sub("JSON( record)?|Turn|As", "", prompt))
    return json.dumps({"name": name, "age": int(age), "city": city})


def answer_sql(prompt: str) -> str:
    signs = {"above": ">", "over": ">", "greater than": ">", "below": "<", "under": "<", "less than": "<"}
    functions = {"highest": "MAX", "lowest": "MIN", "average": "AVG"}
    city = re.findall(r"in ([A-Z][a-z]+)", prompt)[0]
    if found := re.search(r"the (highest|lowest|average) (\w+) of (?:all )?(\w+) in", prompt):
        return f"SELECT {functions[found[1]]}({found[2]}) FROM {found[3]} WHERE city = '{city}';"
    found = re.search(
        r"^(List all|Show the|How many|Count the) (\w+) in .*?(?:with|whose|have a) (\w+) (?:is )?(.+) (\d+)[.?]$",
        prompt,
    )
    assert found, prompt
    what = "*" if found[1] in ("List all", "Show the") else "COUNT(*)"
    return f"SELECT {what} FROM {found[2]} WHERE city = '{city}' AND {found[3]} {signs[found[4]]} {found[5]};"


def answer_date(prompt: str) -> str:
    if found := re.search(r"the (\d+)(st|nd|rd|th) of", prompt):
        last = found[1][-1] if found[1] not in ("11", "12", "13") else "0"
        assert found[2] == {"1": "st", "2": "nd", "3": "rd"}.get(last, "th"), prompt
        prompt = prompt.replace(found[2] + " of", "")
    for pattern, form in ((r"[A-Z][a-z]+ \d{1,2}, \d{4}", "%B %d, %Y"), (r"\d{1,2} [A-Z][a-z]+ \d{4}", "%d %B %Y")):
        if found := re.search(pattern, prompt):
            return datetime.strptime(found[0], form).date().isoformat()
    raise AssertionError(prompt)


def answer_cart(prompt: str) -> str:
    numbers = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    irregular = {"potatoes": "potato", "tomatoes": "tomato", "boxes": "box", "peaches": "peach", "radishes": "radish"}
    bought = []
    for number, plural in re.findall(rf"\b({'|'.join(numbers)}) (\w+)", prompt):
        singular = irregular.get(plural) or re.sub("s$", "", re.sub("rries$", "rrys", plural))
        bought.append(f"{numbers.index(number) + 2} x {singular}")
    return "; ".join(bought)


def answer_time(prompt: str) -> str:
    hours = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    minutes = {"five": 5, "ten": 10, "a quarter": 15, "twenty": 20, "twenty-five": 25, "half": 30}
    (day,) = re.findall(r"[A-Z][a-z]+day", prompt)
    if found := re.search(r"(\w+) o'clock", prompt):
        minute = 60 * (hours.index(found[1]) + 1)
    else:
        found = re.search(r"(five|ten|a quarter|twenty|twenty-five|half) (past|to) (\w+) in", prompt)
        assert found, prompt
        minute = 60 * (hours.index(found[3]) + 1) + minutes[found[1]] * (1 if found[2] == "past" else -1)
    half_day = 12 * 60
    minute = minute % half_day + (0 if "in the morning" in prompt else half_day)
    assert ("in the evening" in prompt) == (minute >= 18 * 60), prompt
    return f"{day[:3].upper()} {minute // 60:02}:{minute % 60:02}"


ORACLES = {"json": answer_json, "sql": answer_sql, "date": answer_date, "cart": answer_cart, "time": answer_time}


def test_every_skill_has_an_oracle():
    assert set(ORACLES) == set(SKILLS)
    assert all(name == skill.name and skill.summary for name, skill in SKILLS.items())


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_follow_from_the_prompts(skill, split):
    for row in generate(skill, split, N, seed=5):
        assert row["completion"] == ORACLES[skill](row["prompt"]), row["prompt"]
        assert row["domain"] == skill


@pytest.mark.parametrize("skill", SKILLS)
def test_train_and_test_share_no_answer_and_no_prompt_whatever_the_seeds(skill):
    train = [row for seed in range(4) for row in generate(skill, "train", N, seed)]
    test = [row for seed in range(4) for row in generate(skill, "test", N, seed)]
    for key in ("prompt", "completion"):
        assert not {row[key] for row in train} & {row[key] for row in test}
    assert {split_of(row["completion"]) for row in train} == {"train"}
    assert {split_of(row["completion"]) for row in test} == {"test"}


@pytest.mark.parametrize("skill", SKILLS)
def test_no_answer_comes_twice_and_the_phrasing_varies(skill):
    rows = generate(skill, "train", N)
    assert len({row["completion"] for row in rows}) == N
    assert len({re.sub(r"\d+|[A-Z][a-z]+", "", row["prompt"]) for row in rows}) >= 3


@pytest.mark.parametrize("skill", SKILLS)
def test_the_seed_decides(skill):
    assert generate(skill, "train", 20, seed=1) == generate(skill, "train", 20, seed=1)
    assert generate(skill, "train", 20, seed=1) != generate(skill, "train", 20, seed=2)
    assert generate(skill, "train", 20, seed=1) == generate(skill, "train", 40, seed=1)[:20]


def test_another_process_with_other_hashes_makes_the_same_examples():
    """`generated.py` needs the standard library only, so that the process need not import torch."""
    program = (
        "import generated, json, sys\n"
        "json.dump([generated.generate(name, 'test', 9, 4) for name in generated.SKILLS], sys.stdout)"
    )
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": str(Path(generated.__file__).parent)}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment)
    assert json.loads(ran.stdout) == [generate(skill, "test", 9, 4) for skill in SKILLS]


def test_examples_are_the_ones_written_here():
    """A change of the generators or of the split would make older results incomparable."""
    rows = {skill: generate(skill, "test", 1, seed=0)[0] for skill in SKILLS}
    assert {skill: (row["prompt"], row["completion"]) for skill, row in rows.items()} == WORKED_EXAMPLES


WORKED_EXAMPLES = {
    "json": ("JSON record for Quinn, 60, from Berlin.", '{"name": "Quinn", "age": 60, "city": "Berlin"}'),
    "sql": (
        "Show the employees in Prague whose salary is greater than 527.",
        "SELECT * FROM employees WHERE city = 'Prague' AND salary > 527;",
    ),
    "date": ("Save the date: launch on 3 August 2058.", "2058-08-03"),
    "cart": ("Buy two boxes, five berries and two bananas.", "2 x box; 5 x berry; 2 x banana"),
    "time": ("The train leaves on Monday at a quarter past seven in the morning.", "MON 07:15"),
}


def test_a_fifth_of_the_instances_is_test():
    share = sum(split_of(f"{n}") == "test" for n in range(5000)) / 5000
    assert 0.18 < share < 0.22


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"unknown skill 'roman'; the skills are json, sql, date, cart"):
        generate("roman", "train", 1)
    with pytest.raises(ValueError, match="split='validation': choose train or test"):
        generate("json", "validation", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n=-1: the number of examples cannot be negative"):
        generate("json", "train", -1)
    assert generate("json", "train", 0) == []


def test_more_examples_than_there_are_is_an_error(monkeypatch):
    tiny = type(SKILLS["json"])("tiny", "three instances", lambda rng: ("p", rng.choice("abc")))
    monkeypatch.setitem(SKILLS, "tiny", tiny)
    with pytest.raises(ValueError, match=r"skill 'tiny': 4 different train examples asked for, only \d found"):
        generate("tiny", "train", 4)
