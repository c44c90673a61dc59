"""The page on size shows what `make plan` prints."""

from docs.tools.scaling import PAGE, page


def test_the_page_is_fresh() -> None:
    text = PAGE.read_text()
    assert text == page(text), "docs/scaling.md is not what the code says: run `make docs`"
