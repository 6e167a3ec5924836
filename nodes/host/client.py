"""The part of ComfyUI's HTTP and websocket API that the demo, the benchmarks and the tests use.

Plain requests use the standard library; only following a run over the websocket needs aiohttp, which ComfyUI ships.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Prompt = Mapping[str, Mapping[str, Any]]
OnEvent = Callable[[str, dict[str, Any]], None]

# The first four bytes of a binary message that is a line of text for a node; all others are pictures.
TEXT_MESSAGE = (3).to_bytes(4, "big")


class PromptRejected(RuntimeError):
    """ComfyUI refused a prompt before running it. `node_errors` is its answer, by node id."""

    def __init__(self, message: str, node_errors: Mapping[str, Any]):
        super().__init__(message)
        self.node_errors = dict(node_errors)


class ExecutionFailed(RuntimeError):
    """A node raised. The message is the node's own; `event` is ComfyUI's whole execution_error."""

    def __init__(self, event: Mapping[str, Any]):
        super().__init__(str(event.get("exception_message", "")).strip())
        self.event = dict(event)
        self.node_id = str(event.get("node_id"))
        self.node_type = str(event.get("node_type"))
        self.exception_type = str(event.get("exception_type"))


class ExecutionInterrupted(RuntimeError):
    """The run was interrupted over the API."""


@dataclass
class Run:
    """What one finished run left: outputs by node id, previews and texts it sent, nodes answered from the cache."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    previews: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)

    def images(self, node_id: str) -> list[dict[str, str]]:
        """References to the images that node `node_id` saved, in batch order; `ComfyClient.image` fetches one."""
        return list(self.outputs.get(node_id, {}).get("images", []))


def describe_rejection(body: Mapping[str, Any], prompt: Prompt) -> str:
    """One line a node: what ComfyUI's answer to a refused prompt says."""
    parts = []
    for node_id, found in (body.get("node_errors") or {}).items():
        kind = found.get("class_type") or prompt.get(node_id, {}).get("class_type", "?")
        for error in found.get("errors", []):
            parts.append(f"node {node_id} ({kind}): {_message(error)}")
    error = body.get("error")
    if not parts and error:
        parts.append(_message(error) if isinstance(error, Mapping) else str(error))
    return "; ".join(parts) or "ComfyUI refused the prompt without saying why."


def _message(error: Mapping[str, Any]) -> str:
    return f"{error.get('message', '')}: {error.get('details', '')}".rstrip(": ")


class ComfyClient:
    """Talks to the ComfyUI at `url`, an address such as http://127.0.0.1:8188."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        # A proxy set for the internet must not be asked for an address on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get_bytes(self, path: str, timeout_s: float = 60.0) -> bytes:
        with self._opener.open(self.url + path, timeout=timeout_s) as answer:
            return answer.read()

    def get(self, path: str, timeout_s: float = 60.0) -> Any:
        return json.loads(self.get_bytes(path, timeout_s))

    def post(self, path: str, body: Any = None) -> bytes:
        data = json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=60.0) as answer:
            return answer.read()

    def object_info(self) -> dict[str, Any]:
        """Every node's description, by node id."""
        return self.get("/object_info")

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def queue(self) -> dict[str, list]:
        """{"queue_running": [...], "queue_pending": [...]}"""
        return self.get("/queue")

    def interrupt(self) -> None:
        """Interrupt the run in progress."""
        self.post("/interrupt")

    def image(self, reference: Mapping[str, str]) -> bytes:
        """The file behind one image reference of a run's outputs."""
        return self.get_bytes(f"/view?{urllib.parse.urlencode(reference)}")

    def run(self, prompt: Prompt, *, on_event: OnEvent = lambda kind, data: None, timeout_s: float = 900.0) -> Run:
        """Submit `prompt` (API format) and follow it to its end, for at most `timeout_s`.

        on_event gets every event of this run (its type and data). Raises PromptRejected when a part of it was refused,
        ExecutionFailed when a node raised, ExecutionInterrupted, and TimeoutError or ConnectionError when it took too
        long or the server went away.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._run(prompt, on_event), timeout_s))
        except asyncio.TimeoutError:  # a class of its own before Python 3.11
            raise TimeoutError(f"The run did not end within {timeout_s:.0f} s.") from None

    async def _run(self, prompt: Prompt, on_event: OnEvent) -> Run:
        import aiohttp

        client_id = uuid.uuid4().hex
        started = time.monotonic()
        async with aiohttp.ClientSession() as session:  # noqa: SIM117
            # Connected before submitting, so that no event is missed.
            async with session.ws_connect(f"{self.url}/ws", params={"clientId": client_id}, max_msg_size=0) as socket:
                prompt_id = await self._submit(session, prompt, client_id)
                run = Run(prompt_id)
                failure = await self._follow(socket, run, on_event)
        run.seconds = time.monotonic() - started
        try:
            await self._collect(run)
        except (OSError, http.client.HTTPException, ValueError):
            if failure is None:  # a server that went down with the run has told why the run failed
                raise
        if failure is not None:
            raise failure
        return run

    async def _submit(self, session, prompt: Prompt, client_id: str) -> str:
        body = {"prompt": prompt, "client_id": client_id}
        async with session.post(f"{self.url}/prompt", json=body) as answer:
            status = answer.status
            try:
                answered = await answer.json(content_type=None)
            except json.JSONDecodeError:
                raise PromptRejected(f"ComfyUI answered a prompt with HTTP status {status}.", {}) from None
        if status != 200:
            raise PromptRejected(describe_rejection(answered, prompt), answered.get("node_errors") or {})
        if answered.get("node_errors"):
            # ComfyUI runs the outputs that are valid and skips the rest; nobody here wants half a result.
            async with session.post(f"{self.url}/queue", json={"delete": [answered["prompt_id"]]}):
                pass
            self.interrupt()
            raise PromptRejected(describe_rejection(answered, prompt), answered["node_errors"])
        return answered["prompt_id"]

    async def _follow(self, socket: Any, run: Run, on_event: OnEvent) -> Exception | None:
        """Follow the run to its last event; what made it fail, if anything did."""
        import aiohttp

        failure: Exception | None = None
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                if message.data[:4] == TEXT_MESSAGE:
                    length = int.from_bytes(message.data[4:8], "big")  # of the node's id, which comes before the text
                    run.texts.append(message.data[8 + length :].decode("utf-8", "replace"))
                else:
                    run.previews.append(message.data)
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            kind, data = event.get("type", ""), event.get("data") or {}
            if data.get("prompt_id") != run.prompt_id:
                continue
            on_event(kind, data)
            if kind == "execution_cached":
                run.cached = list(data.get("nodes", []))
            elif kind == "execution_error":
                failure = ExecutionFailed(data)
            elif kind == "execution_interrupted":
                failure = ExecutionInterrupted(f"The run was interrupted at node {data.get('node_id')}.")
            finished = kind == "executing" and data.get("node") is None
            if finished or failure is not None or kind == "execution_success":
                return failure
        raise ConnectionError("The ComfyUI server closed the connection before the run ended.")

    async def _collect(self, run: Run) -> None:
        # How a run ended is told a moment before it moves from the queue to the history.
        for _ in range(200):
            entry = self.history(run.prompt_id)
            if entry is not None:
                run.outputs = entry.get("outputs", {})
                return
            await asyncio.sleep(0.05)
        raise ConnectionError(f"The finished run {run.prompt_id} did not appear in ComfyUI's history.")
