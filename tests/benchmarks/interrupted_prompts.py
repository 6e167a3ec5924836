"""Prompts of every kind for one ComfyUI server, interrupted and deleted at drawn moments, each followed to its end."""

from __future__ import annotations

import json
import random
import shutil
import time
import urllib.error
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from indomain_guidance.nodes.host.server import ComfyServer

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
IN_FLIGHT = 5  # prompts that wait or run at a time
LOST_AFTER_S = 10  # a prompt that is in neither queue nor history for so long is lost
STUCK_AFTER_S = 600
KINDS = {"sampling": 40, "terms": 15, "generator": 15, "training": 8, "adapting": 7, "mistake": 15}


def _workflow(name: str, *nodes: str) -> dict[str, Any]:
    """The shipped workflow, or these nodes of it."""
    whole = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    return {key: whole[key] for key in nodes} if nodes else whole


def _set(prompt: dict[str, Any], class_type: str, **inputs: Any) -> None:
    for node in prompt.values():
        if node["class_type"] == class_type:
            node["inputs"].update(inputs)


def sampling(dice: random.Random) -> dict[str, Any]:
    prompt = _workflow("in_domain_text_to_image")
    steps = dice.randint(1, 5)
    for kind in ("KSampler", "InDomainSampler"):
        _set(prompt, kind, seed=dice.getrandbits(40), steps=steps, domain_weight=1.0)
    _set(prompt, "EmptyLatentImage", batch_size=dice.randint(1, 3))
    del prompt["7"]["inputs"]["domain_weight"]
    return prompt


def terms(dice: random.Random) -> dict[str, Any]:
    prompt = _workflow(dice.choice(("guidance_terms", "shaped_terms")))
    _set(prompt, "RandomNoise", noise_seed=dice.getrandbits(40))
    _set(prompt, "BasicScheduler", steps=dice.randint(1, 4))
    _set(prompt, "EmptyLatentImage", batch_size=1)
    return prompt


def generator(dice: random.Random) -> dict[str, Any]:
    prompt = _workflow("adapt_generator", "3", "10", "14")
    _set(prompt, "InDomainGeneratorSample", seed=dice.getrandbits(40), batch_size=dice.randint(1, 4))
    return prompt


def training(dice: random.Random) -> dict[str, Any]:
    prompt = _workflow("train_mini_world", "2", "3", "4", "5", "6", "7")
    _set(prompt, "InDomainMiniWorldImages", count=12)
    _set(
        prompt,
        "InDomainTrainingOptions",
        warmup=0,
        sample_count=1,
        sample_steps=1,
        sample_prompts="",
        held_out_share=0.0,
        validate_every=0,
    )
    _set(
        prompt,
        "InDomainTrainDomainUNet",
        name=f"run_{dice.getrandbits(60):x}",
        steps=dice.randint(1, 4),
        batch_size=2,
        sample_every=2,
        seed=dice.getrandbits(31),
    )
    return prompt


def adapting(dice: random.Random) -> dict[str, Any]:
    prompt = _workflow("adapt_generator", "2", "3", "4", "5", "6", "7", "8")
    _set(prompt, "InDomainAdaptOptions", sample_count=1)
    _set(
        prompt,
        "InDomainAdaptGenerator",
        name=f"adapted_{dice.getrandbits(60):x}",
        steps=dice.randint(1, 3),
        batch_size=1,
        sample_every=2,
        seed=dice.getrandbits(31),
    )
    return prompt


def mistake(dice: random.Random) -> dict[str, Any]:
    """A prompt that cannot succeed."""
    what = dice.randrange(9)
    if what < 3:
        prompt = training(dice)
        _set(
            prompt,
            "InDomainTrainDomainUNet",
            **dice.choice(
                (
                    {"name": "con"},
                    {"image_folder": "/nowhere/at/all"},
                    {"image_folder": "evil\ud800"},
                    {"image_folder": "{0..99999999}"},
                    {"model": 5},
                    {"checkpoint": "x\ud800.safetensors"},
                )
            ),
        )
    elif what < 5:
        prompt = sampling(dice)
        for node in ("7", "8", "9"):  # core's own sampler, whose picture ComfyUI would make all the same
            del prompt[node]
        name = dice.choice(("damaged.safetensors", "nobody.safetensors", "\ud800"))
        _set(prompt, "InDomainLoadDomainUNet", unet_name=name)
    elif what < 7:
        prompt = generator(dice)
        _set(prompt, "InDomainLoadGenerator", generator_name=dice.choice(("damaged.pkl", "nobody.pkl", "\ud800.pkl")))
    elif what < 8:
        prompt = terms(dice)
        _set(prompt, "InDomainMultiGuidanceGuider", terms=dice.choice(("text", 1, {"a": 1})))
    else:
        prompt = sampling(dice)
        prompt["10"]["class_type"] = "NoSuchNode"
    return prompt


MAKERS = {
    "sampling": sampling,
    "terms": terms,
    "generator": generator,
    "training": training,
    "adapting": adapting,
    "mistake": mistake,
}


class Disturber:
    """Keeps a server's queue filled and disturbs it.

    ends: how many prompts ended as success, error, interrupted, deleted, refused or lost. wrong: what ended otherwise
    than it should have, in words.
    """

    def __init__(self, server: ComfyServer, dice: random.Random) -> None:
        self.server, self.client, self.dice = server, server.client, dice
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.interrupts = self.made = 0
        self._open: dict[str, tuple[str, dict[str, Any]]] = {}  # by id: kind and prompt
        self._deleted: set[str] = set()
        self._missing: dict[str, float] = {}
        self._stopped: list[dict[str, Any]] = []  # interrupted trainings and adaptations, to be gone on with
        self._seen = time.monotonic()
        for folder, name in (("domain_unets", "damaged.safetensors"), ("generators", "damaged.pkl")):
            path = server.base / "models" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\x80\x04damaged" * 20)

    def run(self, count: int) -> None:
        """Until `count` prompts were made in all and each has ended."""
        while self.made < count or self._open:
            while self.made < count and len(self._open) < IN_FLIGHT:
                self._submit()
            time.sleep(self.dice.random() * 0.15)
            self._disturb()
            self._look()
            if not self.server.alive():
                raise RuntimeError(f"the server ended by itself:\n{self.server.log_tail()}")
            if time.monotonic() - self._seen > STUCK_AFTER_S:
                raise RuntimeError(f"no prompt has ended for {STUCK_AFTER_S} s: {self.client.queue()!r:.500}")
        self._tidy()

    def memory(self) -> int:
        """Bytes of main memory that the idle server holds after one and the same prompt."""
        prompt = sampling(random.Random(1))
        _set(prompt, "KSampler", seed=self.dice.getrandbits(40))
        self.client.run(prompt)
        return psutil.Process(self.server._process.pid).memory_info().rss

    def answers(self) -> bool:
        """Whether the server still runs prompts, and has none left."""
        run = self.client.run(sampling(self.dice))
        return bool(run.images("15")) and self.client.queue() == {"queue_running": [], "queue_pending": []}

    def told(self) -> str:
        return ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))

    # ---- one round

    def _submit(self) -> None:
        self.made += 1
        kind = self.dice.choices(list(KINDS), list(KINDS.values()))[0]
        if kind in ("training", "adapting") and self._stopped and self.dice.random() < 0.5:
            prompt = self._stopped.pop()
        else:
            prompt = MAKERS[kind](self.dice)
        try:
            answer = json.loads(self.client.post("/prompt", {"prompt": prompt}))
        except urllib.error.HTTPError as refusal:
            if refusal.code != 400:
                self.wrong.append(f"{kind}: HTTP status {refusal.code}")
            self._end("refused", kind, refusal.read().decode("utf-8", "replace")[:500])
            return
        self._open[answer["prompt_id"]] = kind, prompt

    def _disturb(self) -> None:
        what = self.dice.random()
        if what < 0.06:
            self.client.interrupt()
            self.interrupts += 1
        elif what < 0.08 and self._open:
            one = self.dice.choice(list(self._open))
            self.client.post("/queue", {"delete": [one]})
            self._deleted.add(one)

    def _look(self) -> None:
        queue = self.client.queue()
        waiting = {item[1] for part in queue.values() for item in part}
        for one in [one for one in self._open if one not in waiting]:
            entry = self.client.history(one)
            if entry is not None:
                self._finished(one, entry)
            elif one in self._deleted:
                self._end("deleted", *self._open.pop(one))
            elif time.monotonic() - self._missing.setdefault(one, time.monotonic()) > LOST_AFTER_S:
                self._end("lost", *self._open.pop(one))

    def _finished(self, one: str, entry: dict[str, Any]) -> None:
        kind, prompt = self._open.pop(one)
        status = entry.get("status") or {}
        messages = dict(status.get("messages", []))
        self.client.post("/history", {"delete": [one]})
        if "execution_interrupted" in messages:
            if kind in ("training", "adapting"):
                self._stopped.append(prompt)
            self._end("interrupted", kind, prompt)
        elif status.get("status_str") == "success":
            self._end("success", kind, prompt)
        else:
            error = messages.get("execution_error", {})
            self._end("error", kind, f"{error.get('exception_type')}: {error.get('exception_message')}")

    def _end(self, end: str, kind: str, about: Any) -> None:
        self.ends[end] += 1
        self._seen = time.monotonic()
        succeeds = {"success": True, "error": False, "refused": False}.get(end, kind != "mistake")
        if end == "lost" or succeeds == (kind == "mistake"):
            self.wrong.append(f"{kind} ended as {end}: {about!r:.600}")

    def _tidy(self) -> None:
        """Remove what the runs wrote: a thousand prompts fill a disk."""
        self._stopped.clear()
        for place in ("output", "temp", "models/domain_unets", "models/generators"):
            for path in (self.server.base / place).glob("*"):
                if path.name.startswith("damaged"):
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name.startswith(("run_", "adapted_")) or place in ("output", "temp"):
                    path.unlink(missing_ok=True)
