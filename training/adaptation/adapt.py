"""An adaptation from a generator to the domain of a prompt: what command line, node and separate process call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ...guidance.distillation.critic import Critic
from ...guidance.distillation.objective import Objective
from ...guidance.distillation.timesteps import Timesteps
from ...guidance.errors import Problem
from ...guidance.files import TRAINING
from ...guidance.files.generator import GeneratorMetadata, LoadedGenerator, read_generator, write_generator
from ...guidance.networks.stylegan2 import StyleGAN2
from ..domain.previews import save_png
from ..engine.engine import Engine, Result, check_resume, due
from ..engine.events import Listener, Sampled, Started, Warned
from ..engine.processes import OneProcess, open_processes
from ..mini_world import MINI_WORLD
from ..prior.opening import open_prior
from ..prior.prior import Prior
from .adapter import Adapter, Encode, check_generator, describe_terms, describe_trained, learning_names, trained_names
from .config import AdaptConfig, prompt_text
from .critic import (
    Distance,
    Domain,
    first_opinion,
    judged_resolution,
    latent_encoder,
    make_objective,
    open_critic,
    open_domain,
)
from .estimate import estimate_adaptation
from .previews import BeforeAfter

__all__ = ["Result", "adapt", "open_generator"]


def adapt(
    config: AdaptConfig,
    *,
    resume: bool | str = "auto",
    generator: StyleGAN2 | LoadedGenerator | None = None,
    critic: Critic | None = None,
    encode: Encode | None = None,
    base: Prior | None = None,
    distance: Distance | None = None,
    listener: Listener = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> Result:
    """Adapt a generator to a prompt (StyleGAN-Fusion, arXiv 2212.04473) as the configuration says; returns when done.

    generator: instead of `config.generator`, and left as it is. critic, with its encode (images [B, 3, H, W] in -1..1
    -> latents, differentiable; an `ImageEncoder` says at which size they are judged): instead of `config.base`,
    prompts, domain, resolution and precision. base: an opened prior instead of `config.base`. distance: of the
    perceptual regularizer, `distance(images, source images) -> [B]`. resume, listener, should_stop, dry_run and the
    run's folder are those of `train.train`; an adaptation that was killed and goes on ends with the same bits too.

    Raises ConfigProblem for a configuration that does not fit generator or critic, FileProblem for files,
    NonFiniteLoss.
    """
    check_resume(resume)
    if (critic is None) != (encode is None):
        raise Problem("Expected a critic and its encode together, got one of them.")
    # ComfyUI runs its nodes in inference mode, in which nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        run = _Adaptation(config, open_processes(config.device), listener, should_stop, critic is not None)
        parts = _Parts(generator, critic, encode, base, distance)
        return run.dry(resume, parts) if dry_run else run.adapt(resume, parts)


def open_generator(name: str) -> LoadedGenerator:
    """The generator of a file, or the mini world's. Raises FileProblem."""
    if name == MINI_WORLD:
        from ..mini_world.assets import generators_dir

        name = str(generators_dir() / "mini-handwriting.safetensors")
    return read_generator(name)


@dataclasses.dataclass
class _Parts:
    """What the caller brings, and what is opened in its place."""

    generator: StyleGAN2 | LoadedGenerator | None
    critic: Critic | None
    encode: Encode | None
    base: Prior | None
    distance: Distance | None
    domain: Domain | None = None

    def open(self, config: AdaptConfig) -> LoadedGenerator:
        """The generator; unless there is a critic the base and its domain model, too."""
        if self.critic is None:
            config.check_prompts()
            self.base = self.base or open_prior(config.base, vae=config.vae, tokenizer=config.tokenizer)
            self.base.check_prompts((config.prompt, config.negative, config.source_prompt))
            self.domain = open_domain(config, self.base)
        if isinstance(self.generator, StyleGAN2):
            return LoadedGenerator(self.generator, GeneratorMetadata(name="generator"), ())
        return self.generator or open_generator(config.generator)


class _Adaptation(Engine):
    """One call of `adapt`."""

    blame = "lower learning_rate or scale, or set latent_clamp and image_quantile"

    def __init__(
        self,
        config: AdaptConfig,
        processes: OneProcess,
        listener: Listener,
        should_stop: Callable[[], bool],
        has_critic: bool,
    ) -> None:
        super().__init__(config, processes, listener, should_stop)
        self.has_critic = has_critic
        self.loaded: LoadedGenerator | None = None
        self.grids: BeforeAfter | None = None

    # ---- beginning

    def dry(self, resume: bool | str, parts: _Parts) -> Result:
        """Everything that can be known before the first step, also of the run that it would go on with."""
        start, _ = self.begin(resume)
        self.loaded = parts.open(self.config)
        self._announce(start, parts)
        return Result("dry_run", 0, None, self.folder)

    def adapt(self, resume: bool | str, parts: _Parts) -> Result:
        with ExitStack() as stack:
            self.take_place(stack)
            start, found = self.begin(resume)
            self.loaded = parts.open(self.config)
            self.open_reports(stack, start)
            self._announce(start, parts)
            self.settle(start)
            objective, encode = self._objective(stack, parts)
            device, source = self.processes.device, self.loaded.generator
            origin = first_opinion(objective, encode, source, device)
            adapter = Adapter(self.config, source, objective, encode, origin=origin, processes=self.processes)
            self.go_on(adapter, start, found)
            del found  # what lies in the checkpoint's file has been copied out of it
            if self.config.sample_every and self.processes.is_main:
                folder = self.samples_path(0).parent
                self.grids = BeforeAfter(self.config, adapter.frozen, folder, anew=start == 0)
            return self.loop()

    def _resolve(self, state: dict[str, Any] | None) -> None:
        """As every run, but a critic that is given computes in a precision of its own, which stands in it as auto."""
        began = None if state is None else state["config"]["precision"]
        if self.has_critic:
            self.config = self.config.with_changes(precision="auto")
        else:
            super()._resolve(None if began == "auto" else state)
        if "auto" in (began, self.config.precision) and state is not None:
            # What nobody chose, then or now, is no other configuration; the facts tell the difference.
            state["config"]["precision"] = self.config.precision

    def _objective(self, stack: ExitStack, parts: _Parts) -> tuple[Objective, Encode]:
        """The critic's objective and the encoder, on this process' device while `stack` is open."""
        config, device = self.config, self.processes.device
        critic, encode = parts.critic, parts.encode
        if critic is None:
            base = parts.base
            resolution = judged_resolution(config, base, self.loaded.generator)
            stack.enter_context(base.autoencoder_on(device))
            critic = open_critic(config, base, resolution, device, parts.domain)
            parts.domain = None  # the critic has its weights now
            encode = latent_encoder(base, resolution, config.precision)
        return make_objective(config, critic, encode, device, parts.distance), encode

    def _announce(self, step: int, parts: _Parts) -> None:
        """Say what begins, and exactly what will learn, before anything takes long."""
        config, source = self.config, self.loaded.generator
        check_generator(config, source, self.processes.world)
        for note in (*self.loaded.notes, *(parts.base.notes if parts.base is not None else ())):
            self.tell(Warned(note))
        names = trained_names(source, config.train, config.freeze_bias)
        text = describe_trained(source, names, config.layers)
        if parts.base is not None:
            size = sum(tensor.numel() for tensor in parts.base.unet.values())
            side = judged_resolution(config, parts.base, source)
            trained = sum(one.numel() for name, one in source.named_parameters() if name in names)
            needs = estimate_adaptation(
                config, source, trained, parts.base, side, self.processes.device, self.processes.world
            )
            text += f"\njudged by {parts.base.name} ({size / 1e6:.1f} M parameters) at {side} px\n{needs.to_text()}"
        self.tell(Started(str(self.folder), config.to_dict(), step, config.steps, 0, text))
        self.warn_beforehand(step)

    def pace(self, config: AdaptConfig, step: int) -> dict[str, float]:
        timesteps = Timesteps(config.t_min, config.t_max, config.t_schedule)
        return {**super().pace(config, step), "the largest timestep": timesteps.upper(step, config.steps)}

    # ---- what becomes of it

    def report(self, step: int) -> bool:
        config = self.config
        if not due(step, config.sample_every, config.steps):
            return False
        continued = step == self.start > 0  # then this may have been done before
        if self.grids is not None and not (continued and self.samples_path(step).exists()):
            with self.learner.shown() as generator:
                picture = self.grids.draw(generator, step)
            self.tell(Sampled(step, str(save_png(picture, self.samples_path(step)))))
        return self.anywhere(float(self.should_stop()))

    def write(self, places: Sequence[Path]) -> None:
        config, metadata = self.config, self._metadata()
        with self.learner.shown() as generator:
            for place in places:
                write_generator(place, generator, metadata, config.file_dtype)

    def _metadata(self) -> GeneratorMetadata:
        """What the finished file tells of itself: its source, and how it was adapted."""
        config, before = self.config, self.loaded.metadata
        stage = {
            "prompt": prompt_text(config.prompt),
            "method": config.method,
            "scale": config.scale,
            "terms": describe_terms(self.learner.objective.critic.guidance),
            "steps": self.learner.step,
            "parent": before.name,
            "parent_sha256": self.learner.source_hash,
            "trained": list(learning_names(self.learner.generator, list(self.learner.parameters), config.layers)),
        }
        return dataclasses.replace(
            before,
            name=config.name,
            licence=config.licence or before.licence,
            history=(*before.history, stage),
            extra={**before.extra, TRAINING: json.dumps(config.public_dict())},
        )
