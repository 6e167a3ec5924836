"""Training inside ComfyUI: the graph's MODEL, CLIP and VAE as a base, progress and cancel, folders, memory.

Nothing of `training/` is imported before a node runs.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ....guidance.errors import Problem, printable
from ....guidance.files import FileProblem, read_keys
from ....guidance.null_text import POOLED_TEXT_ADM
from ....training.mini_world import MINI_WORLD
from ..allowed_folders import allowed_folders, check_allowed
from ..models.export import (
    encode_empty_prompt,
    exported_config,
    exported_latent_format,
    exported_prediction,
    exported_state_dict,
    is_untrained,
)
from ..models.loading import domain_unet_folder, load_domain_unet, load_mini_world_prior
from ..models.model_files import find_model, fingerprint, list_models
from ..progress import ProgressBar

if TYPE_CHECKING:
    from ....training.adaptation.config import AdaptConfig
    from ....training.domain.config import TrainConfig
    from ....training.domain.train import Result
    from ....training.engine.events import Event
    from ....training.prior.prior import Prior

NODE = "Train Domain UNet"
CONNECTED = "connected"
MINI_WORLD_DOMAINS = ("handwriting", "narrow")
RUNS = "domain_training"
PREVIEW_PX = 1024
LATENTS = "indomain_guidance"  # folder in ComfyUI's user folder, which its clients cannot read
MOST_LOOKED_FOR_CHANGES = 250_000  # files and folders, some seconds on a disk
# Often enough to read along, seldom enough to cost nothing.
TEXT_EVERY_S = 0.25
MOST_OF_A_TEXT = 2000  # characters that a node shows


# ---- the prior --------------------------------------------------------------------------------------------------


def list_checkpoints() -> list[str]:
    """The choices for the prior: what is connected, the mini world, ComfyUI's checkpoints."""
    return [CONNECTED, MINI_WORLD, *list_models(("checkpoints",))]


def find_checkpoint(name: str) -> str:
    """The path of a listed checkpoint, "mini_world" or "connected". Raises FileProblem naming the folders."""
    if name in (CONNECTED, MINI_WORLD):
        return name
    return str(find_model(name, ("checkpoints",), NODE))


def checkpoint_fingerprint(name: str | None) -> str:
    """Changes when the file behind a listed checkpoint changes; for ComfyUI's cache of node outputs."""
    return "" if name in (None, CONNECTED, MINI_WORLD) else fingerprint(name, ("checkpoints",))


@torch.no_grad()
def connected_prior(model, clip, vae, prompts: Sequence[str]) -> Prior:
    """MODEL, CLIP and VAE as a prior to train from, weight patches (LoRA) baked in; call it outside inference mode.

    prompts: those that the run will need, encoded here. Raises ValueError for models that cannot be trained from.
    """
    from ....training.prior.encoded_prompts import EncodedPrompts
    from ....training.prior.opening import prior_from_tensors

    config = exported_config(model, NODE)
    prediction_type, zero_snr = exported_prediction(model, NODE)
    has_pooled = config.adm_in_channels in POOLED_TEXT_ADM
    name = f"the connected {type(model.model.model_config).__name__} model"
    null_context = encode_empty_prompt(clip, has_pooled)
    encoded = {prompt: _encode(clip, prompt, has_pooled) for prompt in dict.fromkeys(prompts) if prompt}
    encoded[""] = (null_context.tensor, null_context.pooled)
    return prior_from_tensors(
        exported_state_dict(model, exported_dtype(model)),
        config,
        latent_format=exported_latent_format(model, NODE),
        latent_scale=float(model.model.latent_format.scale_factor),
        prediction_type=prediction_type,
        zero_snr=zero_snr,
        null_context=null_context,
        autoencoder=export_autoencoder(vae, config.out_channels),
        text_encoder=EncodedPrompts(encoded, name),
        name=name,
    )


def exported_dtype(model) -> torch.dtype:
    """What keeps all that the MODEL knows: fp32 once patches are baked in, fp16 for quantised weights."""
    dtype = model.model.get_dtype()
    if model.patches or dtype == torch.float32:
        return torch.float32
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def _encode(clip, prompt: str, has_pooled: bool) -> tuple[Tensor, Tensor | None]:
    context, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    pooled = pooled.detach().float().cpu().clone() if has_pooled and pooled is not None else None
    return context.detach().float().cpu().clone(), pooled


def export_autoencoder(vae, latent_channels: int, node: str = NODE) -> dict[str, Tensor]:
    """A VAE's weights on the CPU under LDM keys. Raises ValueError, in the node's name, for other kinds of VAE."""
    stage = getattr(vae, "first_stage_model", None)
    weights = {} if stage is None else {key: t.detach().to("cpu", copy=True) for key, t in stage.state_dict().items()}
    channels = getattr(weights.get("post_quant_conv.weight"), "shape", (0, 0))[1]
    if "encoder.conv_in.weight" not in weights or channels != latent_channels:
        found = "no VAE" if stage is None else f"{type(stage).__name__} with {channels or 'other'} latent channels"
        raise Problem(
            f"{node}: expected the VAE of a Stable Diffusion model with {latent_channels} latent channels, found "
            f"{found}; connect the VAE that belongs to the model."
        )
    # Core gives every autoencoder a middle attention; all-zero output weights mean that the file has none.
    for side in ("encoder.mid.attn_1.", "decoder.mid.attn_1."):
        if f"{side}proj_out.weight" in weights and not weights[f"{side}proj_out.weight"].any():
            weights = {key: tensor for key, tensor in weights.items() if not key.startswith(side)}
    return weights


# ---- folders and images -----------------------------------------------------------------------------------------


def resolve_data(text: str) -> tuple[str, ...]:
    """The folder input's parts, divided by ";" or lines, as paths; relative ones are looked up in ComfyUI's input
    folder.

    Raises FileProblem for a path that is not there or that no prompt may name. Patterns are left to the trainer.
    """
    from ....training.data.patterns import as_on_disk
    from ....training.data.walking import Watch

    paths, allowed = [], allowed_folders()
    for path in _paths(text, allowed):
        if not has_magic(path) and "{" not in path and not os.path.lexists(as_on_disk(path, Watch(within=allowed))):
            raise FileProblem(
                f"{NODE}: expected a folder of images, found nothing at {path}; give a full path, or the name of a "
                "folder in ComfyUI's input folder."
            )
        paths.append(path)
    return tuple(paths)


def _paths(text: str, allowed: Sequence[str] | None) -> list[str]:
    parts = (part.strip().strip('"') for part in text.replace("\n", ";").split(";"))
    return [_path(part, allowed) for part in parts if part]


def _path(text: str, allowed: Sequence[str] | None) -> str:
    """The path of one part: as it stands where something lies there, else without quotes, or that of a file:// URL."""
    from ....training.engine.paths import is_of_windows, meant_path, plain_path

    plain = plain_path(text)
    if plain != text:
        with suppress(FileProblem):
            path = check_allowed(text, NODE, allowed)
            if os.path.lexists(path):
                return path
    if allowed is None and is_of_windows(plain):
        plain = meant_path(plain)
    return check_allowed(plain, NODE, allowed)


def data_fingerprint(text: str) -> str | float:
    """Changes when a file in one of the folders is added, removed or replaced; for ComfyUI's cache of node outputs.

    Not a number, which equals nothing, where too much lies there to look at, or what is named cannot be trained on: the
    run finds out. ComfyUI asks before it executes anything.
    """
    from ....training.data.sources import fingerprint
    from ....training.data.walking import Cancelled, Watch

    try:
        allowed = allowed_folders()
        watch = Watch(comfy.model_management.processing_interrupted, allowed, most=MOST_LOOKED_FOR_CHANGES)
        return fingerprint(_paths(text, allowed), watch)
    except Cancelled:  # ComfyUI would take an exception here for a node without fingerprint; it cancels before the node
        return ""
    except Problem:
        return float("nan")


def write_images(batches: Sequence[Tensor], folder: Path) -> Path:
    """Write IMAGE batches ([B, H, W, C] in 0..1) as PNG files named by their content, into a folder named likewise.

    Files let the same run continue from a terminal. Returns the folder.
    """
    pictures, names = [], []
    for batch in batches:
        for image in uncancelled(batch):
            image = image.detach().float().cpu()
            if not bool(image.isfinite().all()):
                raise Problem(f"{NODE}: expected finite images, found NaN; check the node that makes them.")
            pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()
            pictures.append(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            names.append(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:24])
    folder = folder / f"images-{hashlib.sha256(''.join(sorted(names)).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    progress = ProgressBar(len(pictures))
    for name, pixels in zip(names, pictures):
        path = folder / f"{name}.png"
        if not path.exists():
            temporary = folder / f".{name}.tmp"
            Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)
            os.replace(temporary, path)
        progress.update(1)
    return folder


def uncancelled(values: Iterable[Any]) -> Iterator[Any]:
    """The values one by one, as long as nobody cancels; then it ends as ComfyUI's other nodes end."""
    for value in values:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield value


def check_data(text: str, images: Sequence[Tensor] | None) -> tuple[str, ...]:
    """The folders that `text` names; none where there are images instead.

    Raises Problem when there are neither or both, and for folders that are not there or that no prompt may name.
    """
    folders = resolve_data(text)
    if folders and images:
        raise Problem(
            f"{NODE}: expected an image folder or the images input, found both; empty the one or disconnect the other."
        )
    if not folders and not images:
        raise Problem(f"{NODE}: expected images to train on, found none; name an image folder or connect images.")
    return folders


def data_of(folders: Sequence[str], images: Sequence[Tensor] | None, run: Path) -> dict[str, Any]:
    """Where the images to train on lie, in the words of a configuration; IMAGE batches are written into the run's
    folder.
    """
    if images:
        return {"data": (str(write_images(images, run)),), "within": ()}
    return {"data": tuple(folders), "within": allowed_folders() or ()}


def given_options(options: Any, known: Collection[str], node: str) -> dict[str, Any]:
    """What an options node hands over. Raises Problem for anything else, which a prompt may hold in its place."""
    if options is None:
        return {}
    are_options = isinstance(options, Mapping)
    wrong = [repr(name) for name in options if name not in known] if are_options else [repr(options)]
    if wrong:
        raise Problem(f"options: expected what {node} gives, found {wrong[0]:.80}; connect {node}, or nothing.")
    return dict(options)


def places(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run's files go and what it computes on, in the words of a configuration."""
    folder = domain_unet_folder()
    if options.get("train") == "low_rank" and options.get("form") == "full":
        # The baseline's file is an ordinary LoRA.
        folder = Path(folder_paths.get_folder_paths("loras")[0])
    return {
        "output": str(Path(folder_paths.get_output_directory()) / RUNS / name),
        "export_to": str(folder),
        "cache": str(latents_folder()),
        "vae": "",
        "tokenizer": str(Path(comfy.sd1_clip.__file__).with_name("sd1_tokenizer")),
        "device": str(comfy.model_management.get_torch_device()),
    }


def latents_folder() -> Path:
    """Where encoded images are kept, for all runs: no prompt says where."""
    return Path(folder_paths.get_system_user_directory(LATENTS)) / "latents"


def finished_file(config: TrainConfig) -> Path:
    """Where the finished file of a run is put for ComfyUI."""
    return Path(config.export_to) / f"{config.name}.safetensors"


def check_name(config: TrainConfig) -> None:
    """Refuse to replace a file that another run made: a first try that failed leaves a folder but no claim to a name.

    Raises FileProblem.
    """
    check_claim(config, finished_file(config), is_untrained)


def check_claim(
    config: TrainConfig | AdaptConfig, path: Path, replaceable: Callable[[Path], bool] = lambda path: False
) -> None:
    """Raise FileProblem where a run would replace `path` and has no claim to it.

    A run has a claim once it has checkpoints, or when the weights are those it finished with. replaceable: whether a
    file may go whoever made it.
    """
    from ....training.engine.checkpoints import find_checkpoints

    own = config.run_folder / f"{config.name}.safetensors"
    if not path.exists() or find_checkpoints(config.run_folder):
        return
    if own.is_file() and own.stat().st_size == path.stat().st_size and weights_digest(own) == weights_digest(path):
        return
    if not replaceable(path):
        raise FileProblem(
            f"{path}: expected no file under this name, found one that this run did not make; choose another name "
            "or move the file away."
        )


def weights_digest(path: Path) -> bytes:
    """SHA-256 of a .safetensors file without its header, which says when it was written."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for chunk in uncancelled(iter(lambda: file.read(1 << 22), b"")):
            digest.update(chunk)
    return digest.digest()


def load_image(path: Path | None) -> Tensor | None:
    """A picture as IMAGE [1, H, W, 3]; None where there is none."""
    if path is None or not Path(path).is_file():
        return None
    with Image.open(path, formats=("PNG",)) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0)[None]


# ---- running ----------------------------------------------------------------------------------------------------


class Progress:
    """Listener of a run: progress bar, text and sample previews on the node; its `should_stop` is ComfyUI's cancel."""

    def __init__(self) -> None:
        context = get_executing_context()
        self._node_id = None if context is None else context.node_id
        self._bar = comfy.utils.ProgressBar(1)
        self._last_text = 0.0
        self._interrupted: BaseException | None = None
        self.warnings: list[str] = []

    def __call__(self, event: Event) -> None:
        from ....training.engine import events

        if isinstance(event, (events.Step, events.Caching)):
            done, total = (event.step, event.steps) if isinstance(event, events.Step) else (event.done, event.total)
            self._update(done, total)
            self.text(describe(event), last=done == total)
        elif isinstance(event, events.Sampled):
            self._preview(event.path)
        elif not isinstance(event, events.Saved):
            if isinstance(event, events.Warned):
                self.warnings.append(event.text)
            self.text(describe(event), last=True)

    def should_stop(self) -> bool:
        return self._interrupted is not None or comfy.model_management.processing_interrupted()

    def cancel(self, interrupted: BaseException) -> None:
        """Take note of a cancel that was raised, and so used up, in the middle of a step."""
        # Its traceback would keep that step's tensors while the step is done once more.
        self._interrupted = interrupted.with_traceback(None)

    def pass_on(self) -> None:
        """Give a cancel that came too late to stop the run back to ComfyUI, which asks before its next node."""
        if self._interrupted is not None:
            comfy.model_management.interrupt_current_processing()

    def raise_if_cancelled(self) -> None:
        """End the node the way ComfyUI ends a cancelled one."""
        if self._interrupted is not None:
            raise self._interrupted
        comfy.model_management.throw_exception_if_processing_interrupted()

    def text(self, text: str, last: bool = True) -> None:
        """Show a line on the node; lines that come too fast are left out unless `last`."""
        now = time.monotonic()
        if self._node_id is None or not (last or now - self._last_text > TEXT_EVERY_S):
            return
        self._last_text = now
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.send_progress_text(printable(text, MOST_OF_A_TEXT), self._node_id)

    def _update(self, value: int, total: int, preview: tuple | None = None) -> None:
        if total != self._bar.total or value < self._bar.current:
            # Newer versions show of one bar only what lies beyond what it has shown before.
            self._bar = comfy.utils.ProgressBar(total)
        try:
            self._bar.update_absolute(value, total, preview)
        except comfy.model_management.InterruptProcessingException as interrupted:
            # Raised here it would tear the run apart in the middle of a step; as a question it lets the run save.
            self.cancel(interrupted)

    def _preview(self, path: str) -> None:
        try:
            with Image.open(path, formats=("PNG",)) as image:
                picture = image.convert("RGB")
        except OSError:
            return
        self._update(self._bar.current, self._bar.total, ("JPEG", picture, PREVIEW_PX))


def describe(event: Event) -> str:
    """An event in the few words that fit on a node."""
    from ....training.engine import events

    if isinstance(event, events.Step):
        left = "" if event.eta_s is None else f", {events.duration(event.eta_s)} left"
        return f"step {event.step} of {event.steps}: loss {event.loss:.4f}{left}"
    if isinstance(event, events.Measuring):
        return f"measuring the prior: {event.done} of {event.total}"
    if isinstance(event, events.Caching):
        return f"encoding images: {event.done} of {event.total}"
    if isinstance(event, events.Started):
        if event.step == event.steps:
            return f"already trained for {event.steps} steps; raise steps to go on, or choose another name"
        images = f"{event.images} images, " if event.images else ""
        return f"{images}{event.steps} steps\n{event.estimate}".rstrip()
    if isinstance(event, events.Stopped) and event.path:
        return f"stopped and saved at step {event.step} in {event.path}; run again to continue"
    return events.describe(event)


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Around a run and what is written into its folder for it: a run that is refused leaves no folder of its own."""
    from ....training.engine.engine import has_learned
    from ....training.engine.lock import locked

    new = not folder.exists()
    try:
        yield
    except Problem:
        with suppress(Problem):  # somebody else is in there by now
            if new and folder.is_dir() and not has_learned(folder):
                with locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        raise


def free_memory() -> None:
    """Move ComfyUI's models out of the accelerator and give its memory back."""
    # Models that nobody holds leave core's list when they are collected; amid core's walk along it they end the prompt.
    gc.collect()
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def run(config: TrainConfig, prior: Prior | None, resume: bool | str) -> tuple[Result, list[str]]:
    """Train; (result, warnings) when the run is finished. Call it outside inference mode.

    prior: None opens `config.base`. A cancelled run is saved, and then ends as ComfyUI's other nodes end when they are
    cancelled. Raises ValueError in one sentence for everything a user can do something about.
    """
    from ....training.domain.train import train

    progress = Progress()

    def learn() -> Result:
        return train(config, resume=resume, base=prior, listener=progress, should_stop=progress.should_stop)

    return finish_run(NODE, config, progress, learn)


def finish_run(
    node: str, config: TrainConfig | AdaptConfig, progress: Progress, learn: Callable[[], Result]
) -> tuple[Result, list[str]]:
    """(result, warnings) of a run that finishes, with memory freed before and after it.

    A cancelled run is saved, and then ends as ComfyUI's other nodes end when they are cancelled; one that was in its
    last step finishes, and what follows it in the graph is cancelled. Raises ValueError in one sentence for memory that
    does not suffice, and for a run that somebody else stopped.
    """
    from ....training.engine.memory import memory_problem

    free_memory()
    try:
        result = learn()
    except (RuntimeError, MemoryError) as problem:
        message = memory_problem(problem, config)
        if message is None:
            raise
        # The traceback holds the tensors of the step that did not fit.
        raise Problem(message) from problem.with_traceback(None)
    finally:
        free_memory()
    if result.status == "stopped":
        progress.raise_if_cancelled()
        # Somebody else ended it, such as the system; an older run's file is not its result.
        where = f"at step {result.step} and saved in {result.run}" if result.step else "before its first step"
        raise Problem(f"{node}: was stopped {where}; run again to continue.")
    progress.pass_on()
    return result, progress.warnings


def base_name(model, clip, vae, checkpoint: str) -> str:
    """The configuration's base: a checkpoint's file, or that the prior is connected.

    Raises Problem when neither a checkpoint nor all of MODEL, CLIP and VAE are there, or both.
    """
    connected = {"model": model, "clip": clip, "vae": vae}
    missing = [name for name, value in connected.items() if value is None]
    if checkpoint != CONNECTED:
        if len(missing) < 3:
            raise Problem(
                f"{NODE}: expected either a checkpoint or connected inputs, found both ('{checkpoint}' and "
                f"{', '.join(name for name in connected if name not in missing)}); set checkpoint to '{CONNECTED}' or "
                "disconnect them."
            )
        return find_checkpoint(checkpoint)
    from ....training.engine.settings import CONNECTED_PREFIX

    if missing:
        raise Problem(
            f"{NODE}: expected a prior, found no {', no '.join(missing)}; connect model, clip and vae, or choose a "
            "checkpoint."
        )
    return f"{CONNECTED_PREFIX} {type(model.model.model_config).__name__}"


def prepare(model, clip, vae, config: TrainConfig) -> Prior | None:
    """The connected prior; None where it is opened from `config.base`.

    Raises Problem for a prediction that is not the connected MODEL's.
    """
    if model is None:
        return None
    prior = connected_prior(model, clip, vae, [*config.sample_prompts, config.caption])
    said = f"{prior.prediction_type}_zero_snr" if prior.zero_snr else prior.prediction_type
    if config.prediction not in ("auto", said):
        raise Problem(
            f"{NODE}: expected prediction auto or {said}, as the connected model predicts, found {config.prediction}; "
            "set it on the model with ModelSamplingDiscrete, or choose the checkpoint by its name."
        )
    return prior


def load_trained(config: TrainConfig, model):
    """The finished file as a MODEL; a LoRA (the low-rank baseline) on the prior it was trained on."""
    path = finished_file(config)
    if not any(key.startswith("lora_") for key in read_keys(path)):
        return load_domain_unet(str(path))
    if model is None and config.base == MINI_WORLD:
        model = load_mini_world_prior()
    elif model is None:
        model = comfy.sd.load_checkpoint_guess_config(config.base, output_vae=False, output_clip=False)[0]
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)[0]


def or_blocked(value: Any) -> Any:
    """The value, or for None what makes ComfyUI skip the nodes that would have used it."""
    return ExecutionBlocker(None) if value is None else value


def mini_world_images(domain: str, count: int, seed: int) -> tuple[Path, Tensor]:
    """Handwriting in the colours of a mini world's domain: (folder in ComfyUI's input folder, IMAGE batch)."""
    from ....training.mini_world.pictures import export_pictures

    folder = Path(folder_paths.get_input_directory()) / "mini_world" / f"{domain}-{count}-seed-{seed}"
    progress = ProgressBar(count)
    paths = export_pictures(folder, domain, count, seed, progress.update_absolute)
    return folder, torch.cat([load_image(path) for path in uncancelled(paths)])
