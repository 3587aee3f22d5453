"""`python wheel_job.py BATCHRUN`: an installed batchrun runs `--help` and a tiny job against the fake provider."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    batchrun = sys.argv[1]
    subprocess.run([batchrun, "--help"], check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fake = Path(__file__).with_name("fake_provider.py")
        provider = subprocess.Popen(
            [sys.executable, str(fake), str(folder / "log.jsonl"), "{}"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert provider.stdout is not None
            port = provider.stdout.readline().strip()
            (folder / "in.csv").write_text("prompt\nhello\nworld\n", encoding="utf-8")
            job = {
                "input": "in.csv", "provider": {"name": "fake", "base_url": f"http://127.0.0.1:{port}/v1"},
                "model": "m", "output": "out.parquet",
            }  # fmt: skip
            (folder / "job.yaml").write_text(json.dumps(job), encoding="utf-8")
            ran = subprocess.run(
                [batchrun, str(folder / "job.yaml"), "--json"], check=True, stdout=subprocess.PIPE, text=True
            )
            assert json.loads(ran.stdout)["ok"] == 2
            assert (folder / "out.parquet").exists()
        finally:
            provider.kill()
            provider.wait()
    print("the wheel works in an empty environment")


if __name__ == "__main__":
    main()
