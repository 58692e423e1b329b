"""Whether a teacher's licence and terms let a student learn from its answers.

A plain reading of stated words, not legal advice: it stops a run that visibly conflicts, and the
recipe's author decides.
"""

from __future__ import annotations

import re

from stillroom.errors import LicenseConflict
from stillroom.teacher.config import TeacherConfig

# A prohibition near the words for making another model out of the answers, or a non-commercial licence.
_CLAUSES = (
    re.compile(
        r"\b(not|no|never|prohibit\w*|forbid\w*|may not|without)\b[^.;]{0,120}"
        r"\b(train\w*|distil\w*|develop\w*|improv\w*|compet\w*)\b[^.;]{0,80}\b(models?|products?|services?|ai)\b",
        re.IGNORECASE,
    ),
    re.compile(r"\bcompet(e|es|ing|itive)\b[^.;]{0,40}\bmodels?\b", re.IGNORECASE),
    re.compile(r"\bnon-?commercial\b|\bresearch[- ]only\b|\bCC-BY-NC\b", re.IGNORECASE),
)


def check_terms(config: TeacherConfig) -> str | None:
    """The clause that is in conflict and was acknowledged, or None where there is none.

    Raises:
        LicenseConflict: licence or terms contain such a clause, and `acknowledge_terms` is empty.
    """
    for said, words in (("terms", config.model.terms), ("license", config.model.license)):
        for clause in _CLAUSES:
            found = clause.search(words)
            if found is None:
                continue
            if config.acknowledge_terms.strip():
                return found.group()
            raise LicenseConflict(
                f"the teacher's {said} seem to forbid training on its answers: {found.group()!r}.\n"
                "help: choose another teacher, or, if you have the right, say why in `teacher.acknowledge_terms`."
            )
    return None
