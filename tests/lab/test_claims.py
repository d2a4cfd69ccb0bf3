"""Claims and their verdicts: as text, as HTML, and refused where there is no such thing."""

import re

import pytest

from qcourse.lab.claims import CLAIMS, SOURCES, Claim, Settled, settle


def test_a_claim_is_settled() -> None:
    settled = settle(1, "HOLDS IF", "nothing clips.")
    assert settled.claim is CLAIMS[1]
    assert repr(settled).splitlines()[0].startswith("Claim 1 (A, B, C): the error |w - w_hat|")
    assert repr(settled).splitlines()[1] == "  HOLDS IF: nothing clips."
    assert "<b>Claim 1</b> (A, B, C): the error" in settled._repr_html_()


def test_html_is_escaped() -> None:
    shown = Settled(Claim(0, "A", "a < b & c"), "WRONG", "<b>float16's</b>")._repr_html_()
    assert "a &lt; b &amp; c<br>" in shown
    assert ": &lt;b&gt;float16's&lt;/b&gt;</div>" in shown


def test_a_number_without_a_claim_is_refused_and_the_claims_are_listed() -> None:
    missing = next(number for number in range(1, max(CLAIMS) + 2) if number not in CLAIMS)
    message = f"^number={missing} must be the number of a claim: 1, 2,"
    with pytest.raises(ValueError, match=message) as caught:
        settle(missing, "HOLDS", "")
    numbers = [int(number) for number in re.findall(r"\d+", str(caught.value))]
    assert numbers == [missing, *CLAIMS]


def test_an_unknown_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^verdict='TRUE' must be one of HOLDS, HOLDS IF, WRONG$"):
        settle(1, "TRUE", "")


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.number)
def test_sources_are_letters_with_commas(claim: Claim) -> None:
    letters = claim.sources.split(", ")
    assert letters == sorted(set(letters) & SOURCES.keys())
