"""Sources of examples: what is read from files, and with which words the rest is refused."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from dylora_moe.data.examples import DataError, Example
from dylora_moe.data.generated import generate
from dylora_moe.data.section import DataRecipe
from dylora_moe.data.sources import load_examples

GOOD = '{"prompt": "p", "completion": "c"}'
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def write_parquet(path, **columns):
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def read(path, domain="", limit=None, **options):
    return load_examples(domain, DataRecipe(train=str(path), **options), "train", limit=limit)


# JSON


def test_extra_keys_are_kept_aside_and_blank_lines_skipped(tmp_path):
    file = write(
        tmp_path / "d.jsonl", {"prompt": "p", "completion": "c", "id": 7}, "", {"prompt": "q", "completion": "d"}
    )
    examples = read(file, domain="sql")
    assert examples == [Example("p", "c", "sql"), Example("q", "d", "sql")]
    assert [example.extra for example in examples] == [{"id": 7}, {}]


def test_unicode_and_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"prompt": "é", "completion": "日"}\n'.encode())
    assert read(tmp_path / "d.jsonl") == [Example("é", "日")]


def test_limit_stops_before_the_lines_after_it(tmp_path):
    file = write(tmp_path / "d.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(3)), "{broken")
    assert [example.prompt for example in read(file, limit=2)] == ["p0", "p1"]
    assert len(read(file, limit=3)) == 3
    with pytest.raises(DataError, match="line 4"):
        read(file, limit=4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{'prompt': 1}"], r"d\.jsonl, line 2: not valid JSON \(Expecting property name.*column 2\)"),
        ([GOOD, "", '{"prompt": "p", "completion": "c"'], r"d\.jsonl, line 3: not valid JSON"),
        (['["p", "c"]'], r"line 1: expected an object with 'prompt' and 'completion', got list"),
        ([GOOD, '{"prompt": "p", "answer": "c"}'], r"line 2: no 'completion'\. Its columns: prompt, answer"),
        (
            ['{"promt": "p", "completion": "c"}'],
            r"line 1: no 'prompt'\. Did you mean 'promt'\? Its columns: promt, completion",
        ),
        (["{}"], r"line 1: no 'messages', no 'prompt' and 'completion', no 'text'\. Its columns: none\. Name"),
        ([GOOD, '{"prompt": "p", "completion": 4}'], r"line 2: 'completion' must be text, got 4"),
        ([GOOD, '{"prompt": "p", "completion": null}'], r"line 2: 'completion' must be text, got None"),
        ([GOOD, '{"prompt": "p", "completion": " \\n"}'], r"line 2: empty 'completion'; there is nothing to learn"),
        (['{"prompt": "", "completion": "c"}'], r"line 1: empty 'prompt'; there is nothing to ask"),
        ([""], r"d\.jsonl: no examples; expected rows with prompt and completion, messages, or text"),
    ],
)
def test_unusable_lines_are_named(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "d.jsonl", *lines))


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "\xe9"}')
    for name, message in (
        ("absent.jsonl", r"absent\.jsonl: cannot be read: No such file"),
        ("absent.csv", r"absent\.csv: cannot be read: "),
        ("absent.parquet", r"absent\.parquet: cannot be read: "),
        ("folder.jsonl", r"cannot be read: Is a directory"),
        ("latin.jsonl", r"latin\.jsonl, line 2: not UTF-8 text \(.*at byte 12\)"),
    ):
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)


def test_json_arrays_and_json_lines_share_a_suffix(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]
    expected = [Example("p", "c"), Example("q", "d")]
    (tmp_path / "array.json").write_text("\n " + json.dumps(rows, indent=2))
    assert read(tmp_path / "array.json") == read(write(tmp_path / "lines.json", *rows)) == expected
    (tmp_path / "array.json").write_text(json.dumps([*rows, 3]))
    with pytest.raises(DataError, match=r"array\.json, row 3: expected an object .* got int"):
        read(tmp_path / "array.json")
    (tmp_path / "array.json").write_text("[\n{},\n]")
    with pytest.raises(DataError, match=r"array\.json: not valid JSON \(.*line [23], column"):
        read(tmp_path / "array.json")


@pytest.mark.parametrize(
    ("name", "text"), [("d.jsonl.gz", GOOD), ("d.json.gz", f"[{GOOD}]"), ("d.csv.gz", "prompt,completion\np,c\n")]
)
def test_gzip_is_read_and_a_file_cut_short_is_refused(tmp_path, name, text):
    whole = gzip.compress(text.encode())
    (tmp_path / name).write_bytes(whole)
    assert read(tmp_path / name) == [Example("p", "c")]
    for broken in (whole[:-12], text.encode(), whole[:12] + b"\x00\xff\x00" + whole[15:]):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match=rf"{name}: cannot be read: \w"):
            read(tmp_path / name)


# Parquet and CSV


def test_parquet_rows_are_examples(tmp_path):
    file = write_parquet(tmp_path / "d.parquet", prompt=["p", "q"], completion=["c", "d"], id=[1, 2])
    examples = read(file, domain="a")
    assert examples == [Example("p", "c", "a"), Example("q", "d", "a")]
    assert [example.extra for example in examples] == [{"id": 1}, {"id": 2}]


def test_csv_cells_are_text(tmp_path):
    file = write(tmp_path / "d.csv", "prompt,completion,n", '"p, ""q""","c', 'd",1', "1,NA,")
    examples = read(file)
    assert examples == [Example('p, "q"', "c\nd"), Example("1", "NA")]
    assert [example.extra for example in examples] == [{"n": "1"}, {"n": ""}]


def test_csv_rows_across_blocks_keep_their_newlines(tmp_path, monkeypatch):
    monkeypatch.setattr("dylora_moe.data.sources._CSV_BLOCK", 64)
    file = write(tmp_path / "d.csv", "prompt,completion", *(f'p{i},"c\n{i}\n"' for i in range(40)))
    assert read(file) == [Example(f"p{i}", f"c\n{i}\n") for i in range(40)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["p", None], "completion": ["c", "c"]}, r"d\.parquet, row 2: 'prompt' must be text, got None"),
        ({"prompt": ["p", "p"], "completion": [1, 2]}, r"row 1: 'completion' must be text, got 1"),
        ({"prompt": ["p", "p"], "completion": ["c", ""]}, r"row 2: empty 'completion'"),
        (
            {"prompt": ["p"], "completions": ["c"]},
            r"row 1: no 'completion'\. Did you mean 'completions'\? Its columns: prompt, completions\.",
        ),
        ({"prompt": pyarrow.array([], "string")}, r"d\.parquet: no examples"),
    ],
)
def test_unusable_parquet_rows_are_named(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        read(write_parquet(tmp_path / "d.parquet", **columns))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"prompt,completion\np,c\np,\n", r"d\.csv, row 3: empty 'completion'; there is nothing to learn"),
        (b"prompt,answer\np,c\n", r"d\.csv, row 2: no 'completion'\. Its columns: prompt, answer"),
        (b"prompt,completion\np,c\np\n", r"d\.csv: cannot be read: .*Row #3: Expected 2 columns, got 1"),
        (b"prompt,completion\np,c,d\n", r"d\.csv: cannot be read: .*Expected 2 columns, got 3"),
        (b"prompt,completion\np,c\np,\xe9\n", r"d\.csv: cannot be read: .*column #1: Row #3: .*invalid UTF8"),
        (b"prompt,prompt\np,c\n", r"d\.csv: the column prompt is there more than once"),
        (b"", r"d\.csv: cannot be read: Empty CSV file"),
        (b"prompt,completion\n", r"d\.csv: no examples"),
    ],
)
def test_unusable_csv_rows_are_named(tmp_path, text, message):
    (tmp_path / "d.csv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "d.csv")


def test_a_broken_parquet_file_is_named(tmp_path):
    file = write_parquet(tmp_path / "d.parquet", prompt=["p"], completion=["c"])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"d\.parquet: cannot be read: .*[Pp]arquet"):
        read(file)


# Forms


def test_columns_map_our_fields_to_theirs(tmp_path):
    file = write_parquet(tmp_path / "d.parquet", question=["p"], completion=["c"], answer=["a"], body=["b"])
    assert read(file, columns={"prompt": "question"}) == [Example("p", "c")]
    (example,) = read(file, columns={"prompt": "question", "completion": "answer"})
    assert example == Example("p", "a")
    assert example.extra == {"completion": "c", "body": "b"}
    assert read(file, columns={"text": "body"}) == [Example("", "b")]
    with pytest.raises(DataError, match=r"row 1: no 'questions'\. Did you mean 'question'\? Its columns: question, "):
        read(file, columns={"prompt": "questions"})


def test_the_form_is_messages_before_prompt_before_text(tmp_path):
    row = {"text": "t", "prompt": "p", "completion": "c", "messages": CHAT[1:3]}
    assert read(write(tmp_path / "a.jsonl", row)) == [Example([CHAT[1]], "1")]
    del row["messages"]
    assert read(write(tmp_path / "b.jsonl", row)) == [Example("p", "c")]
    del row["prompt"], row["completion"]
    assert read(write(tmp_path / "c.jsonl", row)) == [Example("", "t")]


def test_the_separator_goes_with_the_example(tmp_path):
    assert read(write(tmp_path / "d.jsonl", GOOD), separator=" -> ") == [Example("p", "c", separator=" -> ")]
    skill = DataRecipe(skill="date", train=1, separator="")
    assert load_examples("when", skill, "train")[0].separator == ""


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_each_turn_of_the_assistant_is_an_example(tmp_path, suffix):
    extended = [{**message, "name": None} for message in CHAT]
    if suffix == "jsonl":
        file = write(tmp_path / "d.jsonl", {"messages": extended, "id": 1})
    else:
        file = write_parquet(tmp_path / "d.parquet", messages=[extended], id=[1])
    examples = read(file, "a")
    assert examples == [Example(CHAT[:2], "1", "a"), Example(CHAT[:4], "2", "a")]
    assert [example.extra for example in examples] == [{"id": 1}] * 2
    assert [example.question for example in examples] == ["one?", "two?"]
    assert len(read(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CHAT[:2], r"line 1, 'messages': no message of the assistant, so there is nothing to learn"),
        ([], r"no message of the assistant"),
        ("hello", r"line 1, 'messages': expected a list of messages, .* got 'hello'"),
        ([*CHAT, "bye"], r"'messages', message 6: expected role and content, got 'bye'"),
        ([{"role": "user", "text": "x"}], r"message 1: no 'content'\. .*Its columns: role, text"),
        (
            [{"role": "human", "content": "x"}],
            r"message 1: unknown role 'human'; expected system, user, assistant, tool",
        ),
        ([CHAT[1], {"role": "assistant", "content": " "}], r"message 2: empty 'content'; there is nothing to say"),
        ([CHAT[1], {"role": "assistant", "content": None}], r"message 2: 'content' must be text, got None"),
        ([CHAT[2]], r"message 1: the assistant speaks first"),
    ],
)
def test_unusable_conversations_are_named(tmp_path, messages, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "d.jsonl", {"messages": messages}))


# Filter and limits


def test_filter_keeps_matching_rows_and_limit_counts_after_it(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c", "domain": ("math", "law", "art")[i % 3], "n": i} for i in range(9)]
    file = write(tmp_path / "d.jsonl", *rows)
    prompts = lambda **options: [example.prompt for example in read(file, **options)]  # noqa: E731
    assert prompts(filter={"domain": "math"}) == ["p0", "p3", "p6"]
    assert prompts(filter={"domain": "math"}, limit=2) == ["p0", "p3"]
    assert prompts(filter={"domain": ["math", "art"], "n": [3, 5, 7]}) == ["p3", "p5"]
    as_csv = write(tmp_path / "d.csv", "prompt,completion,n", "p0,c,1", "p1,c,2")
    assert read(as_csv, filter={"n": 2}) == [Example("p1", "c")]


def test_a_filter_reads_the_text_of_csv_cells(tmp_path):
    cells = ["prompt,completion,good,score", "a,1,true,5.0", "b,2,False,5", "c,3,TRUE,6"]
    (tmp_path / "d.csv").write_text("\n".join(cells))
    for wanted, kept in (
        ({"good": True}, ["a", "c"]),
        ({"good": False}, ["b"]),
        ({"score": 5}, ["a", "b"]),
        ({"score": [6, "5.0"]}, ["a", "c"]),
    ):
        assert [example.prompt for example in read(tmp_path / "d.csv", filter=wanted)] == kept
    lines = [{"prompt": "a", "completion": "1", "n": 1}, {"prompt": "b", "completion": "1", "n": True}]
    file = write(tmp_path / "d.jsonl", *lines)
    assert [example.prompt for example in read(file, filter={"n": 1})] == ["a"]
    assert [example.prompt for example in read(file, filter={"n": True})] == ["b"]


def test_half_a_character_is_named(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "\\ud83d\\ude00", "completion": "x"}\n{"prompt": "\\uD83D", "completion": "x"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: '\\ud83d' is half of a character"):
        read(file)


def test_a_filter_that_keeps_nothing_lists_what_it_found(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "domain": f"d{i % 12}", "kind": "x"} for i in range(24)]
    file = write(tmp_path / "d.jsonl", *rows)
    with pytest.raises(DataError) as error:
        read(file, filter={"domain": "math", "kind": "x"})
    ten = ", ".join(f"'d{i}'" for i in range(10))
    assert str(error.value) == (
        f"{file}: no row passes filter {{'domain': 'math', 'kind': 'x'}}. Found: 'domain' has {ten}, …; 'kind' has 'x'."
    )
    with pytest.raises(DataError, match=r"line 1: no 'domian'\. Did you mean 'domain'\?"):
        read(file, filter={"domian": "math"})


def test_examples_of_an_expert_come_from_its_skill_or_file(tmp_path):
    skill = DataRecipe(skill="date", train=5, test=4)
    rows = generate("date", "train", 5, seed=3)
    assert load_examples("when", skill, "train", seed=3) == [
        Example(row["prompt"], row["completion"], "when") for row in rows
    ]
    assert len(load_examples("when", skill, "test")) == 4
    assert len(load_examples("when", skill, "test", limit=2)) == 2

    file = str(write(tmp_path / "d.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(9))))
    data = DataRecipe(train=file, test=file, limit=4, test_limit=3)
    assert [example.prompt for example in load_examples("a", data, "train")] == ["p0", "p1", "p2", "p3"]
    assert len(load_examples("a", data, "test")) == 3
    assert len(load_examples("a", data, "test", limit=2)) == 2
    assert len(load_examples("a", data, "test", limit=8)) == 3


def test_missing_held_out_data_names_the_expert(tmp_path):
    file = str(write(tmp_path / "d.jsonl", GOOD))
    with pytest.raises(DataError, match=r"experts\.law\.data has no test file; add `test: FILE\.jsonl`"):
        load_examples("law", DataRecipe(train=file), "test")
    with pytest.raises(DataError, match=r"experts\.law\.data has no test split; add `test_split: NAME`"):
        load_examples("law", DataRecipe(path="some/where"), "test")


# Damage


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_values_too_deep_or_too_long_to_read_are_named(tmp_path, name):
    for value, message in (
        ("[" * 100000 + "]" * 100000, r"nested too deeply"),
        ("9" * 5000, r"cannot be read \(Exceeds"),
    ):
        file = write(tmp_path / name, f'{{"prompt": "a", "completion": "b", "x": {value}}}')
        with pytest.raises(DataError, match=rf"{name}, line 1: {message}"):
            read(file)


# What the peers read


def test_lists_and_patterns_of_files(tmp_path):
    for i in range(3):
        write(tmp_path / f"part-{i}.jsonl", {"prompt": f"p{i}", "completion": "c"})
    write(tmp_path / "more.csv", "prompt,completion", "q,c")
    prompts = [example.prompt for example in read(tmp_path / "part-*.jsonl")]
    assert prompts == ["p0", "p1", "p2"]
    data = DataRecipe(train=[str(tmp_path / "more.csv"), str(tmp_path / "part-[12].jsonl")], limit=2)
    assert [example.prompt for example in load_examples("a", data, "train")] == ["q", "p1"]
    with pytest.raises(DataError, match=r"experts\.a\.data\.train: no file matches '.*none-\*\.jsonl'"):
        read(tmp_path / "none-*.jsonl", "a")
    write(tmp_path / "part-2.jsonl", "{broken")
    with pytest.raises(DataError, match=r"part-2\.jsonl, line 1: not valid JSON"):
        read(tmp_path / "part-*.jsonl")


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("d.tsv", "prompt\tcompletion", "p, ;\tc"),
        ("d.csv", "prompt;completion", '"p, ;";c'),
        ("d.csv", '"prompt";"completion";"a,b"', '"p, ;";c;'),
        ("d.csv", "prompt\tcompletion", "p, ;\tc"),
        ("d.csv", "prompt,completion,a;b", '"p, ;",c,'),
    ],
)
def test_what_parts_the_cells_is_read_from_the_header(tmp_path, name, header, row):
    assert read(write(tmp_path / name, header, row)) == [Example("p, ;", "c")]


def test_tsv_is_read_from_gzip(tmp_path):
    (tmp_path / "d.tsv.gz").write_bytes(gzip.compress(b"prompt\tcompletion\np\tc\n"))
    assert read(tmp_path / "d.tsv.gz") == [Example("p", "c")]


def test_conversational_prompt_and_completion(tmp_path):
    more = [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
    file = write(
        tmp_path / "d.jsonl",
        {"prompt": CHAT[:2], "completion": CHAT[2:3], "tools": []},
        {"prompt": CHAT[:4], "completion": [CHAT[4], *more]},
    )
    assert read(file) == [Example(CHAT[:2], "1"), Example(CHAT[:4], "2"), Example([*CHAT, more[0]], "yes")]
    mixed = write(tmp_path / "mixed.jsonl", {"prompt": CHAT[:2], "completion": "1"})
    with pytest.raises(DataError, match=r"line 1: 'prompt' must be text, got \[\{'role'"):
        read(mixed)


def test_share_gpt(tmp_path):
    said = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "1"}]
    row = {"conversations": said, "system": "be brief", "id": 4}
    (example,) = read(write(tmp_path / "d.jsonl", row))
    assert example == Example(CHAT[:2], "1")
    assert example.place == f"{tmp_path / 'd.jsonl'}, line 1, 'conversations'"
    with pytest.raises(DataError, match=r"line 1, 'conversations', message 1: unknown speaker 'bing'"):
        read(write(tmp_path / "bad.jsonl", {"conversations": [{"from": "bing", "value": "x"}]}))


def test_tools_go_to_the_chat_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "description": None}}]
    bare = [{"type": "function", "function": {"name": "weather"}}]
    for given in (tools, json.dumps(tools)):
        (example,) = read(write(tmp_path / "d.jsonl", {"messages": CHAT[1:3], "tools": given}))
        assert example.template == {"tools": bare}
    (example,) = read(
        write(tmp_path / "d.jsonl", {"m": CHAT[1:3], "t": tools, "chat_template_kwargs": {"x": 1}}),
        columns={"messages": "m", "tools": "t"},
    )
    assert example.template == {"tools": bare, "chat_template_kwargs": {"x": 1}}
    for value, message in (("[", "not valid JSON"), ({"a": 1}, "'tools' must be a list, got")):
        with pytest.raises(DataError, match=rf"d\.jsonl, line 1.*{message}"):
            read(write(tmp_path / "d.jsonl", {"messages": CHAT[1:3], "tools": value}))
    with pytest.raises(
        DataError, match=r"line 1: 'functions' beside chat messages is not read; give functions as `too"
    ):
        read(write(tmp_path / "d.jsonl", {"messages": CHAT[1:3], "functions": [{"name": "f"}]}))


def test_alpaca(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4", "text": "Below is"},
        {"instruction": "Sing.", "input": "", "output": "la", "text": "Below is"},
    ]
    file = write(tmp_path / "d.jsonl", *rows)
    assert read(file) == [Example("Add.\n2 and 2", "4"), Example("Sing.", "la")]
    assert read(file, columns={"prompt": "instruction", "completion": "output"})[0] == Example("Add.", "4")


def test_a_template_makes_a_field_of_the_columns(tmp_path):
    row = {"question": "Why?", "context": {"parts": ["a", "b"]}, "answer": "so"}
    template = {"prompt": "{{ context.parts | join(' ') }}\n{{ question }}"}
    file = write(tmp_path / "d.jsonl", row)
    assert read(file, template=template, columns={"completion": "answer"}) == [Example("a b\nWhy?", "so")]
    assert read(file, template={**template, "completion": "{{ answer }}!"}) == [Example("a b\nWhy?", "so!")]
    with pytest.raises(DataError, match=r"line 1, template 'prompt': 'quest' is undefined\. Its columns: question, "):
        read(file, template={"prompt": "{{ quest }}"}, columns={"completion": "answer"})


def test_the_test_file_can_have_other_columns(tmp_path):
    train = write(tmp_path / "train.jsonl", {"q": "p", "a": "c"})
    test = write(tmp_path / "test.jsonl", {"question": "p", "answer": "c"})
    data = DataRecipe(
        train=str(train),
        test=str(test),
        columns={"prompt": "q", "completion": "a"},
        test_columns={"prompt": "question", "completion": "answer"},
    )
    assert load_examples("", data, "train") == load_examples("", data, "test") == [Example("p", "c")]
    plain = write(tmp_path / "plain.jsonl", GOOD)
    data = DataRecipe(train=str(train), test=str(plain), columns={"prompt": "q", "completion": "a"}, test_columns={})
    assert load_examples("", data, "test") == [Example("p", "c")]
