from pathlib import Path

from whet.doctor.advice import ADVICE

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


def test_the_page_has_every_fault_with_its_fix():
    page = PAGE.read_text()
    for key, advice in ADVICE.items():
        row = f"- **{key}**: {advice.why}.\n  {advice.fix}\n"
        assert row in page, f"docs/doctor.md lacks:\n{row}"
    assert page.count("\n- **") == len(ADVICE)
