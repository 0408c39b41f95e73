"""The benchmark of joint against separate training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)


def test_claims_compare_the_first_and_the_last_width() -> None:
    from benchmarks.liquid_claims import claims, text

    def row(cost: float) -> dict[str, float]:
        return {
            "alone_nll": 1.0,
            "joint_nll": 1 + cost,
            "longer_nll": 1.0,
            "longer_accuracy": 0.5,
            "cost": cost,
            "cost_longer": 2 * cost,
            "alone_accuracy": 0.5,
            "joint_accuracy": 0,
        }

    results = {
        str(dim): {
            "parameters": dim * 1000,
            "tasks": {"image_to_text": row(cost), "text_to_image": row(-cost)},
        }
        for dim, cost in ((48, 0.2), (96, 0.3), (160, 0.1))
    }
    said = claims(results, ["image_to_text", "text_to_image"])
    assert "+0.2000, +0.3000, +0.1000" in said["image_to_text, equal documents"]
    assert "+0.4000, +0.6000, +0.2000" in said["image_to_text, equal steps"]
    assert said["image_to_text, equal steps"].endswith("that falls.")
    assert said["text_to_image, equal documents"].endswith("that does not fall.")
    assert "| 160" in text(results)
    assert "+0.100" in text(results)


@pytest.mark.slow
def test_a_quick_run_trains_alone_and_together(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.liquid_claims import main

    command = ["--quick", "--json", "a.json", "--dims", "8"]
    main(command)
    found = json.loads(Path("a.json").read_text())
    assert list(found["widths"]) == ["8", "16"]
    for row in found["widths"].values():
        assert set(row["tasks"]) == {"text_to_image", "image_to_text"}
        for task in row["tasks"].values():
            assert task["cost"] == pytest.approx(task["joint_nll"] - task["alone_nll"])
            assert task["cost_longer"] == pytest.approx(task["joint_nll"] - task["longer_nll"])
            assert task["longer_nll"] != task["alone_nll"]
            assert 0 <= task["joint_accuracy"] <= 1
    main(command)
    assert "lm: finished before, reused" in capsys.readouterr().out
    again = json.loads(Path("a.json").read_text())
    assert again["widths"] == found["widths"]
