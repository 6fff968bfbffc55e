"""Lets an image pass, or not, by what ECR's scan found in it: reads the findings from a file, asks nobody.

An allowance names one finding, says why, and ends on a day; after it the gate closes again.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Exit with 1 if a scan found something severe that nobody allowed.

  aws ecr describe-image-scan-findings --repository-name weir --image-id imageTag=TAG > findings.json
  python -m scripts.scan_gate findings.json

The allowances are a JSON list of {"name": "CVE-2026-1234", "why": "...", "until": "2026-12-31"}.
"""
SEVERITIES = ("CRITICAL", "HIGH", "MEDIUM", "LOW")
ALLOWANCES = Path("container/scan_allowances.json")


def main(argv: Sequence[str]) -> int:
    """Print what was found; the exit code is 0 if the image may pass, 1 if not, 2 where a file cannot be read."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("findings", type=Path, help="what `aws ecr describe-image-scan-findings` printed")
    parser.add_argument("--allowances", type=Path, default=ALLOWANCES, help="(%(default)s)")
    parser.add_argument("--severity", choices=SEVERITIES, default="CRITICAL", help="from which on (%(default)s)")
    options = parser.parse_args(argv)
    try:
        found = severe(json.loads(options.findings.read_text()), options.severity)
        allowed = until(json.loads(options.allowances.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"cannot be read: {error!r}")
    today = datetime.datetime.now(datetime.UTC).date()
    barred = [finding for finding in found if allowed.get(finding[0], datetime.date.min) < today]
    for name, severity, package in found:
        verdict = "BARRED" if (name, severity, package) in barred else f"allowed until {allowed[name]}"
        print(f"{name:<20} {severity:<9} {package:<30} {verdict}")
    print(f"{len(found)} findings of {options.severity} or above, {len(barred)} of them not allowed")
    return 1 if barred else 0


def severe(scan: dict[str, Any], least: str) -> list[tuple[str, str, str]]:
    """Name, severity and package of what is at least so severe, from a basic or an enhanced scan.

    Raises ValueError for a scan that did not complete: nothing found is no news then.
    """
    status = scan["imageScanStatus"]["status"]
    if status not in ("COMPLETE", "ACTIVE"):
        raise ValueError(f"the scan is {status}, not complete")
    findings = scan["imageScanFindings"]
    rows = [(one["name"], one["severity"], _attribute(one, "package_name")) for one in findings.get("findings", [])] + [
        (
            one["packageVulnerabilityDetails"]["vulnerabilityId"],
            one["severity"],
            one["packageVulnerabilityDetails"]["vulnerablePackages"][0]["name"],
        )
        for one in findings.get("enhancedFindings", [])
    ]
    wanted = SEVERITIES[: SEVERITIES.index(least) + 1]
    return sorted({row for row in rows if row[1] in wanted})


def until(allowances: list[dict[str, str]]) -> dict[str, datetime.date]:
    """The last day of every allowance. Raises ValueError for one without a reason."""
    for allowance in allowances:
        if not allowance["why"].strip():
            raise ValueError(f"{allowance['name']} is allowed without a reason")
    return {allowance["name"]: datetime.date.fromisoformat(allowance["until"]) for allowance in allowances}


def _attribute(finding: dict[str, Any], key: str) -> str:
    return next((pair["value"] for pair in finding.get("attributes", []) if pair["key"] == key), "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
