"""The student's card says what it was made from, how it did and how to run it."""

from __future__ import annotations

import yaml

from stillroom.evaluation import CardFacts, write_card

from .sample import HOSTILE, run_report


def test_the_card_has_readable_metadata_figures_and_every_engine(tmp_path):
    report = run_report(8)
    facts = CardFacts(
        name="my-student", base_model="org/base", license="Apache-2.0", gguf="student.gguf", max_tokens=77
    )
    text = write_card(tmp_path, report, facts).read_text()
    meta = yaml.safe_load(text.split("---")[1])
    assert meta["license"] == "apache-2.0"
    assert meta["base_model"] == "org/base"
    metrics = meta["model-index"][0]["results"][0]["metrics"]
    assert {"type": "accuracy", "name": "pooled", "value": 0.5} in metrics
    for wanted in (
        "AutoModelForCausalLM",
        "vllm serve",
        "llama-server -m ./student/student.gguf --jinja",
        "ollama create",
        "max_new_tokens=77",
        "0123456789abcdef",
        "fedcba",
    ):
        assert wanted in text
    assert "| student: student-model | plainly | 0.50 (0.15–0.85) | 0.50 (0.15–0.85) | 0.50 (0.22–0.78) |" in text


def test_without_a_gguf_or_licence_the_card_says_so(tmp_path):
    text = write_card(tmp_path, run_report(8), CardFacts(name="s")).read_text()
    assert "ollama" not in text
    assert "weights: not stated" in text


def test_hostile_names_do_not_break_the_card(tmp_path):
    report = run_report(8)
    models = tuple(m.model_copy(update={"name": HOSTILE + "|\n# x\ud800"}) for m in report.models)
    text = write_card(tmp_path, report.model_copy(update={"models": models}), CardFacts(name=HOSTILE)).read_text()
    assert "<script>" not in text.split("---", 2)[2]
    assert "\n# x" not in text
