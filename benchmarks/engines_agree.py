"""Does a student score the same in llama.cpp as in Transformers?

    python -m benchmarks.engines_agree runs/quickstart

Every held-out item of a finished run, by the run's own rules: the exported safetensors through Transformers, the
exported GGUF through llama.cpp. The goal is an accuracy within one point (0.01).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from stillroom.pipeline import evaluate_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run whose student has a GGUF")
    parser.add_argument("--limit", type=int, help="only so many items, chosen by content")
    arguments = parser.parse_args()
    student = arguments.run / "student"
    models = {"transformers": student, "llama.cpp": next(student.glob("*.gguf"))}
    figures, verdicts = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for engine, path in models.items():
            out = Path(folder, f"{engine}.json")
            figures[engine] = evaluate_model(str(path), arguments.run, engine=engine, limit=arguments.limit, out=out)
            print(figures[engine].pop("text"))
            verdicts[engine] = {item["id"]: item for item in json.loads(out.read_text())["items"]}
    ours, theirs = verdicts.values()
    accuracy = {engine: found["accuracy"]["pooled"] for engine, found in figures.items()}
    print(
        json.dumps(
            {
                "accuracy": accuracy,
                "difference": abs(accuracy["transformers"] - accuracy["llama.cpp"]),
                "items": len(ours),
                "same_verdict": sum(ours[name]["ok"] == theirs[name]["ok"] for name in ours) / len(ours),
                "same_text": sum(ours[name]["text"] == theirs[name]["text"] for name in ours) / len(ours),
                "figures": figures,
                "versions": {name: version(name) for name in ("torch", "transformers", "xllamacpp")},
            }
        )
    )


if __name__ == "__main__":
    main()
