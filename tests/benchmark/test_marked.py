"""What a command writes into a page stays between its marks."""

from __future__ import annotations

import pytest

from dylora_moe.benchmark.marked import write_marked


def test_only_what_is_between_the_marks_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a <!-- one:begin -->old<!-- one:end --> b\n<!-- two:begin -->\n<!-- two:end -->\n")
    write_marked(page, "one", "new")
    assert page.read_text() == (
        "a <!-- one:begin -->\n\nnew\n\n<!-- one:end --> b\n<!-- two:begin -->\n<!-- two:end -->\n"
    )
    before = page.read_text()
    write_marked(page, "one", "new")
    assert page.read_text() == before


@pytest.mark.parametrize("text", ["", "<!-- one:begin -->", "<!-- one:end --><!-- one:begin -->"])
def test_a_page_without_the_marks_is_said(tmp_path, text):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"page\.md has no <!-- one:begin -->"):
        write_marked(tmp_path / "page.md", "one", "new")
    assert (tmp_path / "page.md").read_text() == text
