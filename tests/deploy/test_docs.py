"""The docs: generated pages are what the code says, links lead somewhere, the README stays short."""

import re
from pathlib import Path

import pytest

from deploy.settings_reference import EXAMPLE, GROUPS, REFERENCE, default_of, example, reference
from inference_service.config import Settings

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
README_LINES = 150


def test_every_setting_is_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(Settings.model_fields)


def test_the_generated_files_are_up_to_date() -> None:
    hint = "run `python -m deploy.settings_reference`"
    assert REFERENCE.read_text() == reference(), hint
    assert EXAMPLE.read_text() == example(), hint


def test_a_copy_of_the_example_changes_nothing() -> None:
    lines = EXAMPLE.read_text().splitlines()
    assert not [line for line in lines if line and not line.startswith("#")]
    found = (re.fullmatch(r"# ([A-Z0-9_]+)=(.*)", line) for line in lines)
    shown = {match[1]: match[2] for match in found if match is not None}
    assert shown == {name.upper(): default_of(name) for name in Settings.model_fields}


def test_defaults_as_they_are_written() -> None:
    written = {name: default_of(name) for name in ("gcs_bucket", "warm_launcher", "engine", "disk_cache_gib")}
    assert written == {
        "gcs_bucket": "your-models-bucket",
        "warm_launcher": "true",
        "engine": "auto",
        "disk_cache_gib": "",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
