"""The commands of docs/archives.md, typed one after the other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra.storage import storage_for
from tests.end_to_end.test_mixed_folder import film
from tests.object_stores import BUCKET
from tests.test_documentation import ROOT, shell_lines

GUIDE = ROOT / "docs/archives.md"
# In one process with one Ray, which has the bucket's keys from its start, as a cluster's nodes do.
PROGRAM = """
import json, sys
import ray
from jobs.cli import main
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
for words in json.load(sys.stdin):
    status = main(words)
    if status:
        sys.exit(f"{words}: status {status}")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a dozen commands, most of which start a pool of workers
def test_every_command_of_the_guide_runs(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert s3_bucket.startswith(f"s3://{BUCKET}/") and BUCKET == "archive"  # the guide's bucket
    monkeypatch.chdir(tmp_path)
    for name in ("tapes/one.mp4", "tapes/deep/two.mkv"):
        film(Path(name), "libx264")
        storage_for(s3_bucket).publish(film(Path("copy") / name), f"s3://{BUCKET}/{name}")
    table = re.search(r"```text\n(source,.*?)```", GUIDE.read_text(), re.S)
    assert table is not None
    Path("list.csv").write_text(table[1].replace("one", "tapes/one").replace("two", "tapes/deep/two"))
    typed = [words[1:] for words in shell_lines(GUIDE) if words[0] == "upriver"]
    assert len(typed) > 10 and sum(words[0] == "cancel" for words in typed) == 1
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(typed),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert told.returncode == 0, told.stderr[-3000:]
    for place in ("restored/one.mp4", "restored/deep/two.mkv", "restored_mp4/one.mp4", "report.html"):
        assert Path(place).exists(), place
    assert {Path(info.place).name for info in storage_for(s3_bucket).list(f"s3://{BUCKET}/restored")} >= {"one.mp4"}
