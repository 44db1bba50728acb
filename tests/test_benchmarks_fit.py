from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "speed_fit.py"
# Plain descent on the sphere behind the published signature; like the published script it asks for what is not here.
STAND_IN = """
import clip
import torchvision.datasets as datasets


def image_opt(feat, init_classifier, plabel, lr, iter, tau_i, alpha):
    assert alpha > 1 and init_classifier.shape == (feat.shape[1], plabel.shape[1])
    columns = init_classifier.clone()
    for _ in range(iter):
        slope = feat.T @ ((feat @ columns / tau_i).softmax(1) - plabel) / (len(feat) * tau_i)
        columns = columns - 0.002 * slope
        columns = columns / columns.norm(dim=0)
    return columns
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a quick run writes beside a stand-in for the published code."""
    for package in ("timm", "sklearn"):
        pytest.importorskip(package, reason=f"the speed benchmark names the version of {package}")
    folder = tmp_path_factory.mktemp("fit")
    (folder / "main.py").write_text(STAND_IN, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(SCRIPT), "--quick", "--threads", "1"]
    command += ["--published", str(folder), "--output", str(folder / "out")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    page = (folder / "out" / "speed-fit.md").read_text(encoding="utf-8")
    assert str(folder) not in page
    return json.loads((folder / "out" / "speed-fit.json").read_text(encoding="utf-8")), page


def test_races_end_at_the_published_kl(results: tuple[dict[str, Any], str]) -> None:
    races = results[0]["race"]
    assert [one["with_tags"] for one in races] == [True, False]
    for one in races:
        assert [each["steps"] for each in one["published"]] == [5, 20]
        for each in one["published"]:
            assert one["whole"]["kl"] <= each["kl"] < one["text"]["kl"]
            reached = each["reached"]
            assert reached["kl"] <= each["kl"] * (1 + 1e-6)
            assert each["times"] == pytest.approx(each["seconds"] / reached["seconds"])
        counts = [each["iterations"] for each in one["tries"]]
        assert counts == sorted(set(counts))


def test_the_planted_are_found_and_nothing_beats_the_fit(results: tuple[dict[str, Any], str]) -> None:
    for one in results[0]["recovery"]:
        assert one["fit"]["kl"] < one["planted_kl"]
        assert one["text"]["raw"] < one["fit"]["cosine"]["raw"]
        assert one["least_squares"]["centered"] > 0.95


def test_memory_is_measured(results: tuple[dict[str, Any], str]) -> None:
    (one,) = results[0]["memory"]
    assert one["data_bytes"] == 2000 * (32 * 2 + 4)
    assert 0 <= one["peak_bytes"] < 10**8


def test_the_page_says_what_was_measured_and_names_no_machine(results: tuple[dict[str, Any], str]) -> None:
    found, page = results
    assert len(found["goals"]) == 2 + 1
    assert all(f"| {goal['what']} | {goal['goal']} | " in page for goal in found["goals"])
    for words in ("--quick --published FOLDER`", "1 threads", "n=150, C=4, without tags", "n=2,000", "0.02 and 0.08"):
        assert words in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5, 7, 8, 9, 10}
    assert str(SCRIPT.parents[1]) not in json.dumps(found) + page
    assert platform.node() not in page or len(platform.node()) < 4
