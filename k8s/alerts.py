"""Write the alerts of `infra/dashboards/alerts.yaml` as a PrometheusRule: `python k8s/alerts.py`, from anywhere.

Kustomize reads no file above its own folder, and cannot put the content of one into a custom resource, so this one file
of k8s/ is made. A test compares the two.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "infra" / "dashboards" / "alerts.yaml"
TARGET = ROOT / "k8s" / "components" / "monitoring" / "alerts.yaml"
HEAD = """\
# Made by `python k8s/alerts.py` from infra/dashboards/alerts.yaml; do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: upriver
  namespace: upriver
  labels: {release: kube-prometheus-stack}
spec:
"""


def prometheus_rule(rule_file: str) -> str:
    """Return a PrometheusRule with the groups of a rule file of Prometheus."""
    lines = [line for line in rule_file.splitlines() if not line.startswith("#")]
    return HEAD + "".join(f"  {line}\n" if line else "\n" for line in lines)


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule(SOURCE.read_text()))
