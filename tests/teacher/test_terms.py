"""A run that the teacher's terms visibly forbid stops before it starts, unless the recipe says why not."""

from __future__ import annotations

import pytest

from stillroom.errors import LicenseConflict
from stillroom.teacher import TeacherConfig, check_terms


def config(acknowledge: str = "", **fields: str) -> TeacherConfig:
    model = {"engine": "llama.cpp", "path": "x.gguf", **fields}
    return TeacherConfig.model_validate({"model": model, "acknowledge_terms": acknowledge})


@pytest.mark.parametrize(
    "terms",
    [
        "You may not use output to develop models that compete with us.",
        "Outputs must not be used to train other AI models.",
        "Use for training competing models is prohibited.",
        "For research-only use.",
    ],
)
def test_a_clause_against_training_refuses_the_run_unless_acknowledged(terms):
    with pytest.raises(LicenseConflict, match="acknowledge_terms"):
        check_terms(config(terms=terms))
    assert check_terms(config("we have a written permission", terms=terms)) in terms


def test_a_non_commercial_licence_is_a_conflict():
    with pytest.raises(LicenseConflict, match="license"):
        check_terms(config(license="CC-BY-NC-4.0"))


@pytest.mark.parametrize(
    "terms",
    ["", "Apache-2.0: answers may be used for any purpose.", "Answers may be used to train and improve models."],
)
def test_terms_that_allow_it_pass(terms):
    assert check_terms(config(license="Apache-2.0", terms=terms)) is None
