"""The report says of every record what became of it, on disk and on a page."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from stillroom.data import check
from stillroom.data.digests import DigestSet
from tests.data.conftest import Write
from tests.data.records import bedrock, line

HOSTILE = "<script>alert(1)</script>"


def test_every_record_is_counted_once_and_every_rejection_listed(write: Write, tmp_path) -> None:
    good = b"".join(line(bedrock(f"question {n}", "an answer" if n % 2 else None)) for n in range(50))
    path = write("a.jsonl", good + b"{bad\n" * 300 + line(bedrock("question 0")))

    insights = check(path, out=tmp_path / "out", minimum=10)

    assert (insights.accepted, insights.rejected, insights.labelled) == (50, 301, 25)
    listed = [json.loads(each) for each in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(listed) == 301
    assert [each["line"] for each in listed] == list(range(51, 352))
    assert set(listed[0]) == {"file", "line", "reason", "message", "help"}
    assert "invalid_json" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert insights.to_text().startswith(
        "50 of 351 records accepted (enough), 0 with a warning\n      300  invalid_json"
    )
    report = json.loads(json.dumps(insights.to_json()))
    assert report["by_reason"] == {"invalid_json": 300, "duplicate_prompt": 1}
    assert report["enough"] is True
    assert len(report["samples"]["invalid_json"]) == 20


def test_several_paths_are_one_data_set(write: Write) -> None:
    first, second = write("a.jsonl", [bedrock("same")]), write("b.jsonl", [bedrock("same")])

    assert check(first, second).to_json()["by_reason"] == {"duplicate_prompt": 1}


class Page(HTMLParser):
    """What a browser would load and run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]


def test_the_page_is_one_offline_file_in_which_data_stays_text(write: Write, tmp_path) -> None:
    path = write(f"{HOSTILE.replace('/', '_')}.jsonl", [bedrock(**{HOSTILE: 1}), bedrock("fine")])

    page = check(path).to_html(tmp_path / "page.html").read_text(encoding="utf-8")

    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.links == []
    assert "&lt;script&gt;" in page
    assert "unknown_field" in page
    assert "prefers-color-scheme: dark" in page
    assert "Not enough" in page


def test_a_page_without_findings_says_so(write: Write, tmp_path) -> None:
    page = check(write("a.jsonl", [bedrock("fine")]), minimum=1).to_html(tmp_path / "page.html").read_text()

    assert "No record was rejected" in page


def test_a_digest_set_is_a_set() -> None:
    digests = [(n * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") for n in range(1, 5_001)]
    seen = DigestSet(slots=8)

    assert all(seen.add(digest) for digest in digests)
    assert not any(seen.add(digest) for digest in digests)
    assert len(seen) == 5_000
    assert seen.add(bytes(8))
    assert not seen.add(bytes(8))
