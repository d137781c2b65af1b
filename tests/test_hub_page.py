"""What docs/hub.md says can be typed, works."""

from tests.test_readme import blocks, run_commands, run_snippet


def test_commands_and_snippets_of_the_page_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_commands("docs/hub.md")
    names: dict = {}
    for snippet in blocks("docs/hub.md", "python"):
        run_snippet(snippet, names)
    assert names["indices"].shape == (1, 2, 4, 6) and names["picture"].size == (128, 128)
    assert type(names["pipeline"]) is type(names["same"])
