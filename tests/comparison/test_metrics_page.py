"""The table of all metrics."""

import re
from pathlib import Path

from metrics_page import rows

from experiments.comparison.figures import limits_of

ROOT = Path(__file__).parents[2]


def test_figures_cut_no_interval_that_a_metric_can_have():
    narrower = [row for row in rows() if limits_of(row.example)[0] > row.low or limits_of(row.example)[1] < row.high]
    assert not narrower


def test_every_topic_and_every_name_of_the_table_is_in_the_code():
    folders = ("lightning_modules", "datamodules")
    code = "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    for row in rows():
        assert all((ROOT / "lightning_modules" / topic).is_dir() for topic in row.topics), row
        for word in re.findall(r"[a-z][A-Za-z_\d]*[A-Za-z\d]", row.name.replace("_", "-")):
            assert word in code, row
