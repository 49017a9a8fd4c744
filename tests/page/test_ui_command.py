"""`spmhub ui` as a process: it says where the page is, answers there, and ends by a signal without a traceback."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

pytest.importorskip("gradio", reason='needs pip install "spm-hub[ui]"')

WAIT = 300
UI = (sys.executable, "-m", "spm_hub.cli", "ui", "--no-hub", "--device", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_page_until_a_signal(number, tmp_path):
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path / "data")}
    with subprocess.Popen(
        [*UI, "--port", "0", "--quiet"], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            url = process.stdout.readline().strip()
            with urllib.request.urlopen(url, timeout=WAIT) as answer:
                assert "spm-hub" in answer.read().decode()
            process.send_signal(number)
            _, said = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in said
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


@pytest.mark.slow
def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*UI, "--port", port], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
