"""The README says what the repository holds."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_two_commands_are_demo_and_test():
    first, second = re.findall(r"^(make \w+)", README, flags=re.MULTILINE)[:2]
    assert (first, second) == ("make demo", "make test")


def test_its_training_loops_are_those_of_the_example():
    example = (ROOT / "examples" / "training_loop.py").read_text(encoding="utf-8")
    for marker in ("attach", "scheduler"):
        loop = re.search(rf"# \[{marker}\]\n(.*?)# \[/{marker}\]", example, flags=re.DOTALL)
        assert loop
        assert loop[1].strip() in README


def test_its_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
