"""Whether to ship a candidate: its worst finding decides."""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.evaluation.page.rules import RULES, Finding, Outcome
from qdiff.evaluation.page.sheet import Sheet

WORDS = {
    Outcome.SHIP: "Ship",
    Outcome.LOOK: "Look closer",
    Outcome.STOP: "Do not ship",
    Outcome.NOT_MEASURED: "Not measured",
}


@dataclass(frozen=True)
class Verdict:
    """The worst finding decides. findings: by the rule's title, in the order of `RULES`."""

    candidate: str
    findings: dict[str, Finding]

    @property
    def outcome(self) -> Outcome:
        return max(Outcome.SHIP, *(finding.outcome for finding in self.findings.values()))

    @property
    def word(self) -> str:
        return WORDS[self.outcome]

    @property
    def reason(self) -> str:
        """Why, in one line: the findings that decided, or that all rules are met."""
        if self.outcome == Outcome.SHIP:
            met = sum(finding.outcome == Outcome.SHIP for finding in self.findings.values())
            return f"The {met} rules that could be checked are met."
        return " ".join(f.says for f in self.findings.values() if f.outcome == self.outcome)

    @property
    def missing(self) -> list[str]:
        """The titles of the rules that nothing was measured for."""
        return [title for title, finding in self.findings.items() if finding.outcome == Outcome.NOT_MEASURED]


def judge(sheet: Sheet, candidate: str) -> Verdict:
    """Return the verdict on one candidate by every rule."""
    return Verdict(candidate, {rule.title: rule.judge(sheet, candidate) for rule in RULES})
