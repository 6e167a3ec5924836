"""An adaptation from a generator to the domain of a prompt: what the command line and the node call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...guidance.distillation.critic import Critic
from ...guidance.distillation.objective import Objective
from ...guidance.distillation.timesteps import Timesteps
from ...guidance.errors import Problem
from ...guidance.files import TRAINING
from ...guidance.files.generator import GeneratorMetadata, LoadedGenerator, read_generator, write_generator
from ...guidance.networks.stylegan2 import StyleGAN2
from ..engine.events import Listener
from ..engine.reports import Report
from ..engine.run import Result, Run
from ..mini_world import MINI_WORLD
from ..mini_world.assets import generators_dir
from ..prior.opening import open_prior
from ..prior.prior import Prior
from .adapter import Adapter, check_generator
from .config import AdaptConfig
from .critic import Domain, judged_resolution, latent_encoder, make_objective, open_critic, open_domain
from .estimate import estimate_adaptation
from .layers import describe_trained, learning_names, trained_names
from .opinion import Encode, describe_terms
from .previews import BeforeAfter

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Result", "adapt", "open_generator"]


def adapt(
    config: AdaptConfig,
    *,
    resume: bool | str = "auto",
    generator: StyleGAN2 | LoadedGenerator | None = None,
    critic: Critic | None = None,
    encode: Encode | None = None,
    base: Prior | None = None,
    listener: Listener = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> Result:
    """Adapt a generator to a prompt (StyleGAN-Fusion, arXiv 2212.04473) as the configuration says; returns when done.

    generator: instead of `config.generator`, and left as it is. critic, with its encode (images [B, 3, H, W] in -1..1
    -> latents, differentiable; an `ImageEncoder` says at which size they are judged): instead of `config.base`,
    prompts, domain, resolution and precision. base: an opened prior instead of `config.base`. resume, listener,
    should_stop, dry_run and the run's folder are those of `domain.train.train`; an adaptation that is killed and
    resumed ends with the same bits.

    Raises ConfigProblem for a configuration that does not fit generator or critic, FileProblem for files,
    NonFiniteLoss.
    """
    if critic is None and encode is None:
        given = None
    elif critic is not None and encode is not None:
        given = critic, encode
    else:
        raise Problem("Expected a critic and its encode together, got one of them.")
    return _Adaptation(config, listener, should_stop, generator, given, base)(resume, dry_run)


def open_generator(name: str) -> LoadedGenerator:
    """The generator of a file, or the mini world's. Raises FileProblem."""
    if name == MINI_WORLD:
        name = str(generators_dir() / "mini-handwriting.safetensors")
    return read_generator(name)


class _Adaptation(Run[AdaptConfig]):
    """One call of `adapt`."""

    advice = "lower learning_rate or scale, or set latent_clamp and image_quantile"
    source: LoadedGenerator
    adapter: Adapter

    def __init__(
        self,
        config: AdaptConfig,
        listener: Listener,
        should_stop: Callable[[], bool],
        generator: StyleGAN2 | LoadedGenerator | None,
        critic: tuple[Critic, Encode] | None,
        prior: Prior | None,
    ) -> None:
        super().__init__(config, listener, should_stop)
        self.given, self.critic, self.prior = generator, critic, prior
        self.domain: Domain | None = None

    # ---- beginning

    def settle(self, state: Mapping[str, Any] | None) -> None:
        """As `Run.settle`, but a critic that is given brings its own precision, and the setting is then auto."""
        began = None if state is None else state["config"]["precision"]
        if self.critic is not None:
            self.config = self.config.with_changes(precision="auto")
        else:
            super().settle(None if began == "auto" else state)
        if state is not None and "auto" in (began, self.config.precision):
            # What nobody chose, then or now, is no other configuration; the facts tell the difference.
            state["config"]["precision"] = self.config.precision

    def open(self) -> Sequence[str]:
        config = self.config
        if self.critic is None:
            config.check_prompts()
            self.prior = self.prior or open_prior(config.base, vae=config.vae, tokenizer=config.tokenizer)
            self.prior.check_prompts((config.prompt, config.negative, config.source_prompt))
            self.domain = open_domain(config, self.prior)
        if isinstance(self.given, StyleGAN2):
            self.source = LoadedGenerator(self.given, GeneratorMetadata(name="generator"), ())
        else:
            self.source = self.given or open_generator(config.generator)
        check_generator(config, self.source.generator, self.processes.world)
        return [*self.source.notes, *(self.prior.notes if self.prior is not None else ())]

    def announce(self, start: int) -> tuple[int, str]:
        """No images; which weights will learn, and which diffusion model judges them."""
        config, source, prior = self.config, self.source.generator, self.prior
        names = trained_names(source, config.train, config.freeze_bias)
        text = describe_trained(source, names, config.layers)
        if prior is None:
            return 0, text
        size = sum(tensor.numel() for tensor in prior.unet.values())
        side = judged_resolution(config, prior, source)
        trained = sum(weight.numel() for name, weight in source.named_parameters() if name in names)
        needs = estimate_adaptation(config, source, trained, prior, side, self.processes.device, self.processes.world)
        return 0, f"{text}\njudged by {prior.name} ({size / 1e6:.1f} M parameters) at {side} px\n{needs.to_text()}"

    def pace(self, config: AdaptConfig, step: int) -> dict[str, float]:
        timesteps = Timesteps(config.t_min, config.t_max, config.t_schedule)
        return {**super().pace(config, step), "the largest timestep": timesteps.upper(step, config.steps)}

    def make_learner(self, stack: ExitStack, state: Mapping[str, Any] | None) -> Adapter:
        objective, encode = self._objective(stack)
        self.adapter = Adapter(self.config, self.source.generator, objective, encode, processes=self.processes)
        return self.adapter

    def _objective(self, stack: ExitStack) -> tuple[Objective, Encode]:
        """The critic's objective and the encoder, on this process' device while `stack` is open."""
        config, device, prior = self.config, self.processes.device, self.prior
        if self.critic is not None:
            critic, encode = self.critic
        else:
            assert prior is not None
            resolution = judged_resolution(config, prior, self.source.generator)
            stack.enter_context(prior.autoencoder_on(device))
            critic = open_critic(config, prior, resolution, device, self.domain)
            self.domain = None  # the critic has its weights now
            encode = latent_encoder(prior, resolution, config.precision)
        return make_objective(config, critic, encode, device), encode

    # ---- what becomes of it

    def make_reports(self) -> list[Report]:
        wanted = self.config.sample_every and self.processes.is_main
        grids = BeforeAfter(self.config, self.adapter.frozen) if wanted else None

        def draw(step: int) -> Image:
            assert grids is not None
            with self.adapter.shown() as generator:
                return grids.draw(generator, step)

        return [self.sample_report(draw)]

    def write(self, places: Sequence[Path]) -> None:
        metadata = self._metadata()
        with self.adapter.shown() as generator:
            for place in places:
                write_generator(place, generator, metadata, self.config.file_dtype)

    def _metadata(self) -> GeneratorMetadata:
        """The finished file's metadata: its source, and how it was adapted."""
        config, before, adapter = self.config, self.source.metadata, self.adapter
        stage = {
            "prompt": config.prompt,
            "method": config.method,
            "scale": config.scale,
            "terms": describe_terms(adapter.objective.critic.guidance),
            "steps": adapter.step,
            "parent": before.name,
            "parent_sha256": adapter.source_hash,
            "trained": list(learning_names(adapter.generator, list(adapter.parameters), config.layers)),
        }
        return dataclasses.replace(
            before,
            name=config.name,
            licence=config.licence or before.licence,
            history=(*before.history, stage),
            extra={**before.extra, TRAINING: json.dumps(config.public_dict())},
        )
