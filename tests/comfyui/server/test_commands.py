"""run.py's own commands as a user starts them: the demo to its last line, and servers that always end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run_py(comfyui_path):
    """The command line of run.py with the ComfyUI and the Python of this test run."""

    def command(name: str, *arguments: str) -> list[str]:
        return [
            sys.executable,
            str(ROOT / "run.py"),
            name,
            "--comfyui",
            str(comfyui_path),
            "--python",
            sys.executable,
            *arguments,
        ]

    return command


def answers(url: str) -> bool:
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url + "/system_stats", timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def processes_naming(text: str) -> list[int]:
    """Ids of running processes with `text` on their command line. Linux only."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_demo_from_the_command_line(run_py, tmp_path):
    from PIL import Image

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    output = tmp_path / "pictures"
    result = subprocess.run(
        run_py("demo", "--output", str(output)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
        env={**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary)},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 1, "standard output holds the result and nothing else"
    summary = json.loads(lines[-1])
    assert set(summary) == {"images", "contact_sheet", "seconds", "samples_per_step"}
    assert summary["seconds"] > 0
    prior, domain, both = summary["samples_per_step"].values()
    assert prior == 2.0 and domain == 1.0 and 2.0 < both <= 3.0  # below 3 where the domain term has an interval
    assert len(summary["images"]) >= 3 * 4 and len(set(summary["images"])) == len(summary["images"])
    for path in map(Path, summary["images"]):
        assert path.parent == output
        with Image.open(path) as image:
            assert image.size == (64, 64)
            assert len(image.convert("RGB").getcolors(4096) or range(4097)) > 1, f"{path} is one flat colour"
    with Image.open(summary["contact_sheet"]) as sheet:
        assert sheet.width > 1000 and sheet.height > 600
    # A line for each prompt went to standard error, and the private base directory is gone with its server.
    rows = len({Path(image).name.partition("__")[0] for image in summary["images"]})
    assert f"1/{rows} a " in result.stderr and f"{rows}/{rows} a" in result.stderr
    assert list(temporary.glob("indomain-comfyui-*")) == []
    assert processes_naming(str(temporary)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_demo_interrupted_in_the_middle_leaves_nothing_running(run_py, tmp_path):
    process = subprocess.Popen(
        run_py("demo", "--output", str(tmp_path / "pictures")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    try:
        # The first sampler of the first prompt is done, the second one is running.
        assert any(line.startswith("1/") for line in process.stderr)
        assert processes_naming(str(tmp_path / "indomain-comfyui-"))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and output == ""
    assert processes_naming(str(tmp_path / "indomain-comfyui-")) == []
    assert list(tmp_path.glob("indomain-comfyui-*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux ends the children of a killed process")
def test_serve_ends_its_server_however_it_is_ended(run_py, tmp_path):
    ways = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    started = []
    try:
        # All at once, each on a port of its own.
        for number in ways:
            base = tmp_path / signal.Signals(number).name
            process = subprocess.Popen(
                run_py("serve", "--output", str(base)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            started.append((number, base, process))
        urls = {number: process.stdout.readline().strip() for number, _, process in started}
        assert len(set(urls.values())) == len(ways)
        for number, base, process in started:
            assert answers(urls[number]) and len(processes_naming(str(base / "comfyui.db"))) == 1
            process.send_signal(number)
        for number, base, process in started:
            status = process.wait(60)
            assert status == (-number if number == signal.SIGKILL else 128 + number)
            deadline = time.monotonic() + 20
            while processes_naming(str(base / "comfyui.db")) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert processes_naming(str(base / "comfyui.db")) == [] and not answers(urls[number])
            # The address with which the editor's own test opens a template, and where things are.
            told = process.stderr.read()
            assert f"{urls[number]}/?template=in_domain_text_to_image&source=in-domain-guidance" in told
            assert str(base) in told
    finally:
        for _, _, process in started:
            process.kill()
    assert (ROOT / "run.py").is_file(), "the checkout behind the link is untouched"


def test_server_that_cannot_start_shows_its_log(comfyui_path):
    from indomain_guidance.nodes.host.server import ComfyServer, ServerProblem

    with pytest.raises(ServerProblem, match=r"(?s)unrecognized arguments: --no-such-flag.*ended before it answered"):  # noqa: SIM117
        with ComfyServer(comfyui_path, flags=["--no-such-flag"]):
            pass


def test_a_start_that_takes_long_says_that_it_goes_on(tmp_path, monkeypatch, capfd):
    from indomain_guidance.nodes.host import server as module

    (tmp_path / "main.py").write_text("import time; print('reading models'); time.sleep(60)", encoding="utf-8")
    monkeypatch.setattr(module, "_NEWS_EVERY_S", 0.5)
    with pytest.raises(module.ServerProblem, match="(?s)reading models.*did not answer .* within 4 s"):  # noqa: SIM117
        with module.ComfyServer(tmp_path, flags=["--cpu"], start_timeout_s=4.0):
            pass
    assert "still starting" in capfd.readouterr().err


def test_taken_port_is_given_up_for_another(comfyui_path, monkeypatch):
    from indomain_guidance.nodes.host import server as module

    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        taken = occupied.getsockname()[1]
        free = module.free_port
        offers = iter([taken])
        monkeypatch.setattr(module, "free_port", lambda: next(offers, None) or free())
        with module.ComfyServer(comfyui_path) as running:
            assert running.port != taken
            assert running.client.get("/system_stats")["system"]["comfyui_version"]
            base = running.base
        assert not base.exists()
    assert not answers(running.url)


def test_base_directory_of_a_failed_start_is_removed_and_the_checkout_is_not(comfyui_path, tmp_path, monkeypatch):
    from indomain_guidance.nodes.host.server import ComfyServer, ServerProblem

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "precious.txt").write_text("kept", encoding="utf-8")
    broken = tmp_path / "no_comfyui_here"
    broken.mkdir()
    server = ComfyServer(broken, checkout=checkout, flags=["--cpu"])
    with pytest.raises(ServerProblem):
        server.__enter__()
    assert not server.base.exists()
    assert (checkout / "precious.txt").read_text(encoding="utf-8") == "kept"
