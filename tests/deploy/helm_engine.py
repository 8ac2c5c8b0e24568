"""The chart through Helm's own engine, beside `chart.py`: the same objects, and nothing that `helm lint` minds.

    python -m venv /tmp/helm && /tmp/helm/bin/pip install helm-python-sdk==0.2.2 pyyaml
    /tmp/helm/bin/python -m tests.deploy.helm_engine

The package brings Helm 4.2.3 as a library of 244 MB, which is why it is no part of the environment. Run this
after a change of the chart.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.deploy.chart import CHART, PLACEHOLDERS, RELEASE, documents, render, templates, values

CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "with a Secret": PLACEHOLDERS,
    "with GPUs": {"ray": {"gpuWorkers": {"enabled": True}}},
    "another registry": {"image": {"repository": "registry.example/modeseek-ray", "tag": "0.1.0-cuda"}},
}


def main() -> int:
    """Print what was compared; 1 where the two differ or lint finds an error."""
    import helm_python  # type: ignore[import-not-found]

    chart = helm_python.Chart.load(CHART)
    bad = 0
    for name, changes in CASES.items():
        chart.validate_schema(changes)
        rendered = chart.render(changes, name=RELEASE["Name"], namespace=RELEASE["Namespace"])
        theirs = {path.rpartition("/")[2]: documents(text) for path, text in rendered.items()}
        ours = {template: documents(render(template, values(**changes))) for template in templates()}
        differ = [t for t in templates() if ours[t] != theirs.get(t, [])] + sorted(set(theirs) - set(ours))
        report = helm_python.lint(CHART, changes, strict=True, namespace=RELEASE["Namespace"])
        found = [m["error"] for m in report["messages"] if m["severity"] >= 2] + report["errors"]
        count = sum(map(len, ours.values()))
        print(
            f"{name}: {count} objects, {'the same' if not differ else f'differ in {differ}'}; lint: {found}"
        )
        bad += bool(differ or found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
