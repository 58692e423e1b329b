"""One page that shows what a run achieved: report.html, which opens offline, and report.json with all its data.

Promise: the page asks nothing of any network, and nothing that a model or a data set wrote can act in it. Every
text passes the template's escaping; a content security policy names the page's own script and style by their
digests, so that even an escaping mistake could not run another.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from stillroom.evaluation import report_view, wording
from stillroom.evaluation.report_data import RunReport
from stillroom.storage import write_atomic

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: str | Path, report: RunReport) -> Path:
    """Write report.html and report.json into `folder`, each in one step.

    Returns:
        The path of report.html.
    """
    folder = Path(folder)
    write_atomic(folder / "report.json", report.model_dump_json(indent=1))
    path = folder / "report.html"
    write_atomic(path, render(report))
    return path


def render(report: RunReport) -> str:
    """The page as text."""
    script = Markup((_TEMPLATES / "report.js").read_text(encoding="utf-8"))
    style = Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8"))
    page = _environment().get_template("report.html.jinja")
    view: Mapping[str, Any] = report_view.build(report)
    return page.render(
        **view, script=script, style=style, script_digest=_csp_digest(script), style_digest=_csp_digest(style)
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("share", "percent", "p_value", "seconds", "size", "count", "price", "failure"):
        environment.filters[name] = getattr(wording, name)
    return environment


def _csp_digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
