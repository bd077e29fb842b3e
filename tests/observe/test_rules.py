"""Configurations, rules and dashboards, held to what they say without a service."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import PHASE_BUCKETS_S, table
from tests.observe.conftest import DEPLOYED, installed

pytestmark = pytest.mark.fast

PROMETHEUS = DEPLOYED / "prometheus"
DOCUMENT = DEPLOYED.parent / "docs" / "observability.md"
TESTS: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule["alert"] for rule in RULES if "alert" in rule]


def promtool(*arguments: str, cwd: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    return subprocess.run([installed("promtool"), *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("config", ["prometheus.yml", "cluster.yml"])
def test_the_configuration_is_one(config: str) -> None:
    checked = promtool("check", "config", config)
    assert checked.returncode == 0, checked.stderr
    assert "18 rules found" in checked.stdout


def test_the_rules_do_what_their_tests_say() -> None:
    tested = promtool("test", "rules", "rules_test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_seen_firing_and_not_firing(alert: str) -> None:
    outcomes = {
        bool(case["exp_alerts"]) for test in TESTS for case in test["alert_rule_test"] if case["alertname"] == alert
    }
    assert outcomes == {True, False}


@pytest.mark.parametrize("alert", ALERTS)
def test_the_tests_see_it_when_an_alert_is_lost(alert: str, tmp_path: Path) -> None:
    rules = (PROMETHEUS / "rules.yml").read_text()
    rule = next(rule for rule in RULES if rule.get("alert") == alert)
    (tmp_path / "rules.yml").write_text(rules.replace(f"expr: {rule['expr']}", "expr: vector(0) > 1", 1))
    (tmp_path / "rules_test.yml").write_text((PROMETHEUS / "rules_test.yml").read_text())
    assert promtool("test", "rules", "rules_test.yml", cwd=tmp_path).returncode != 0


def test_rules_ask_only_for_metrics_that_there_are() -> None:
    ours = set(re.findall(r"`(attendant_\w+)`", table()))
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for rule in RULES:
        for name in re.findall(r"[\w:]*attendant_\w+(?::\w+)?", rule["expr"]):
            assert name in recorded or re.sub(r"_(bucket|count|sum)$", "", name) in ours, f"{name} in {rule}"


def test_the_objective_is_a_bound_of_the_histogram() -> None:
    bounds = {bound for rule in RULES for bound in re.findall(r'le="([\d.]+)"', rule["expr"])}
    assert bounds == {"0.4"}
    assert bounds <= set(map(str, PHASE_BUCKETS_S))


def test_the_published_table_of_metrics_is_what_the_code_gives() -> None:
    _, after = DOCUMENT.read_text().split("<!-- metrics: python -m service.metrics -->\n")
    shown, _ = after.split("\n<!-- end of metrics -->")
    assert shown == table(), "put the output of `python -m service.metrics` between the markers"
