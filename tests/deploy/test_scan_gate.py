"""The gate behind the scan: what passes and what does not."""

import json

import pytest

from scripts.scan_gate import main


@pytest.fixture
def judged(tmp_path):
    def judge(scan, allowances=(), *flags):
        findings, allowed = tmp_path / "findings.json", tmp_path / "allowances.json"
        findings.write_text(json.dumps(scan))
        allowed.write_text(json.dumps(list(allowances)))
        return main([str(findings), "--allowances", str(allowed), *flags])

    return judge


def basic(*severities, status="COMPLETE"):
    findings = [
        {"name": f"CVE-{i}", "severity": severity, "attributes": [{"key": "package_name", "value": "openssl"}]}
        for i, severity in enumerate(severities)
    ]
    return {"imageScanStatus": {"status": status}, "imageScanFindings": {"findings": findings}}


def test_a_critical_finding_stops_and_lesser_ones_pass(judged):
    assert judged(basic()) == 0
    assert judged(basic("HIGH", "LOW")) == 0
    assert judged(basic("LOW", "CRITICAL")) == 1
    assert judged(basic("HIGH"), [], "--severity", "HIGH") == 1


def test_an_enhanced_scan_is_read_too(judged):
    details = {"vulnerabilityId": "CVE-9", "vulnerablePackages": [{"name": "zlib"}]}
    enhanced = [{"severity": "CRITICAL", "packageVulnerabilityDetails": details}]
    scan = {"imageScanStatus": {"status": "ACTIVE"}, "imageScanFindings": {"enhancedFindings": enhanced}}
    assert judged(scan) == 1
    assert judged(scan, [{"name": "CVE-9", "why": "not reachable", "until": "9999-01-01"}]) == 0


def test_an_allowance_ends_on_its_day_and_has_a_reason(judged):
    assert judged(basic("CRITICAL"), [{"name": "CVE-0", "why": "x", "until": "2020-01-01"}]) == 1
    with pytest.raises(SystemExit) as bad:
        judged(basic("CRITICAL"), [{"name": "CVE-0", "why": " ", "until": "9999-01-01"}])
    assert bad.value.code == 2


def test_a_scan_that_did_not_complete_is_no_pass(judged):
    with pytest.raises(SystemExit) as bad:
        judged(basic(status="FAILED"))
    assert bad.value.code == 2
