"""The run in one sentence, as strong as its figures and no stronger."""

from __future__ import annotations

from stillroom.evaluation.report_data import ModelReport, RunReport
from stillroom.evaluation.statistics import GapClosed
from stillroom.evaluation.wording import count, fraction, gap_interval, percent, share


def headline(report: RunReport) -> str:
    """What the student achieved, with its interval and the number of items; plain where there is less to say."""
    student, teacher, base = report.model("student"), report.model("teacher"), report.model("base")
    if student is None or student.plain is None:
        return "This run has no measured student."
    if report.gap is not None:
        return _closed(report.gap, report, student, teacher)
    accuracy = student.plain.accuracy()
    level = percent(report.evaluation.confidence)
    before = f", from {share(base.plain.accuracy().value)}" if base and base.plain else ""
    return (
        f"The student reaches {share(accuracy.value)} ({level} interval {share(accuracy.low)} to "
        f"{share(accuracy.high)}){before}, on {accuracy.n:,} held-out items. "
        "No teacher answered them, so there is no gap to compare with."
    )


def _closed(gap: GapClosed, report: RunReport, student: ModelReport, teacher: ModelReport | None) -> str:
    figures = f"{share(gap.student)} against {share(gap.teacher)}, from {share(gap.base)}, on {gap.n:,} held-out items"
    smaller = _smaller(student, teacher)
    interval = gap_interval(gap, report.evaluation.confidence)
    if gap.value is None:
        lead = "does not lead the base student" if gap.teacher <= gap.base else "could not be compared"
        return f"The teacher {lead}, so there is no gap to close: the student stands at {figures}{smaller}."
    if gap.value < 0:
        return f"Training made the student worse: it ends at {figures}{smaller} ({interval} of the gap closed)."
    if gap.value > 1:
        return (
            f"The student passes its teacher: {figures}{smaller}; that is {percent(gap.value)} of the gap ({interval})."
        )
    return f"The student closes {percent(gap.value)} of the gap to its teacher ({interval}): {figures}{smaller}."


def _smaller(student: ModelReport, teacher: ModelReport | None) -> str:
    if teacher is None:
        return ""
    if student.parameters and teacher.parameters and student.parameters < teacher.parameters:
        ratio = fraction(student.parameters / teacher.parameters)
        return f", with {ratio} of its parameters ({count(student.parameters)} against {count(teacher.parameters)})"
    if student.size_bytes and teacher.size_bytes and student.size_bytes < teacher.size_bytes:
        return f", at {fraction(student.size_bytes / teacher.size_bytes)} of its size"
    return ""
