"""infra/monitoring: what is shown and alerted is what the code tells, in PromQL that parses."""

import contextlib
import json
import re
from typing import Any

import promql_parser
import pytest
import yaml

from pipeline.ray_metrics import COUNTERS, GAUGES, STATS
from tests.infra.rendering import INFRA, ROOT

DASHBOARD = json.loads((INFRA / "monitoring" / "dashboard.json").read_text())
RULES = yaml.safe_load((INFRA / "monitoring" / "rules.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
TOLD = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
README = (INFRA / "README.md").read_text()


def _expression(target: dict[str, Any]) -> str:
    """A panel's, with Grafana's variables filled in."""
    return str(target["expr"]).replace("$__rate_interval", "5m").replace("$run", ".*")


EXPRESSIONS = [_expression(target) for target in TARGETS] + [rule["expr"] for rule in ALERTS]


def _selectors(node: Any) -> list[Any]:
    """The vector selectors within a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    inner = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    inner += list(getattr(node, "args", None) or [])
    return [found for one in inner if one is not None for found in _selectors(one)]


def test_every_expression_parses_and_names_what_the_code_tells() -> None:
    named = [one.name for text in EXPRESSIONS for one in _selectors(promql_parser.parse(text))]
    assert len(named) > 25
    assert set(named) == TOLD


def test_the_readme_lists_every_metric() -> None:
    assert set(re.findall(r"`(ray_ganymede_\w+)`", README)) == TOLD


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_counters_are_looked_at_by_their_growth_and_stats_by_names_that_there_are(text: str) -> None:
    for name in re.findall(r"ray_ganymede_\w+_total", text):
        assert re.search(rf"(?:rate|increase)\({name}[^()]*\[\w+\]\)", text)
    for pattern in re.findall(r'stat=~?"([^"]+)"', text):
        assert any(re.fullmatch(pattern, stat) for stat in STATS)


def test_every_stat_is_shown() -> None:
    patterns = [pattern for text in EXPRESSIONS for pattern in re.findall(r'stat=~?"([^"]+)"', text)]
    assert [stat for stat in STATS if not any(re.fullmatch(one, stat) for one in patterns)] == []


def test_rules_say_what_is_wrong_and_what_to_do() -> None:
    assert set(RULES) == {"groups"}
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS) == 5
    for rule in ALERTS:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+m", rule["for"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "what_to_do"}
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]


def test_flags_that_alerts_name_are_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import cli

    known = ""
    for verb in ("train", "generate"):
        with contextlib.suppress(SystemExit):
            cli.main([verb, "--help"])
        said = capsys.readouterr()
        known += said.out + said.err
    flags = {flag for rule in ALERTS for flag in re.findall(r"--[a-z.-]+[a-z]", rule["annotations"]["what_to_do"])}
    assert len(flags) > 4
    assert [flag for flag in sorted(flags) if flag not in known] == []


def test_the_dashboard_works_with_any_prometheus() -> None:
    variables = {one["name"]: one["type"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "run": "query"}
    sources = [one["datasource"]["uid"] for one in [*DASHBOARD["panels"], *TARGETS]]
    assert set(sources) == {"${datasource}"}
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_the_pod_monitor_finds_rays_nodes_through_the_network_policy() -> None:
    monitor = yaml.safe_load((INFRA / "monitoring" / "podmonitor.yaml").read_text())
    base = ROOT / "infra" / "k8s" / "base"
    policies = [one for one in yaml.safe_load_all((base / "network.yaml").read_text()) if one]
    (policy,) = [one for one in policies if one["metadata"]["name"] == "metrics"]
    assert policy["metadata"]["namespace"] in monitor["spec"]["namespaceSelector"]["matchNames"]
    assert policy["spec"]["podSelector"] == monitor["spec"]["selector"]
    (source,) = policy["spec"]["ingress"][0]["from"]
    assert source["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": monitor["metadata"]["namespace"]
    }
    cluster = yaml.safe_load((base / "cluster.yaml").read_text())
    ports = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    (port,) = [
        one["containerPort"] for one in ports if one["name"] == monitor["spec"]["podMetricsEndpoints"][0]["port"]
    ]
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port}]
