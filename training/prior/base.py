"""The base of a training run: a checkpoint taken apart into the prior's UNet, its noise, its latents and its text.

Stable Diffusion 1.x, 2.x and XL in LDM layout (arXiv 2112.10752, arXiv 2307.01952) and the mini world. Latents outside
this module are always *scaled*: posterior mean times the family's factor, which is what the UNet is trained on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...guidance.diffusion import NoiseSchedule
from ...guidance.errors import Problem
from ...guidance.files import (
    FileProblem,
    ModelFile,
    check_finite,
    check_unet,
    prior_content_hash,
    split_checkpoint,
    strip_unet_prefix,
    unet_layout,
)
from ...guidance.files.layouts import AUTOENCODER_PREFIX, TEXT_ENCODER_PREFIXES, unet_prefix
from ...guidance.files.recognise import AUTOENCODER, BASE, recognise_names, refusal, refusal_of
from ...guidance.networks.autoencoder import Autoencoder, autoencoder_config_from_state_dict
from ...guidance.networks.text_encoder import (
    END_TOKEN,
    START_TOKEN,
    TextEncoder,
    empty_prompt_tokens,
    text_encoder_config_from_state_dict,
)
from ...guidance.networks.unet import UNet, UNetConfig, timestep_embedding, unet_config_from_state_dict
from ...guidance.null_text import FLOAT8, POOLED_TEXT_ADM, NullContext, load_unet
from ..domain.config import CONNECTED_BASE, TrainConfig
from ..engine.settings import ConfigProblem

MINI_WORLD = "mini_world"
PREDICTIONS = ("auto", "epsilon", "v_prediction", "v_prediction_zero_snr", "sample")
# Scaled latent = mean * factor: 1 / standard deviation of the training latents, as each family was published with.
LATENT_SCALES = {"sd15": 0.18215, "sdxl": 0.13025}
# Sides in pixels that published families were made for, by the name of their latents.
NATIVE_RESOLUTION = {"sd15": 512, "sdxl": 1024, "mini_world": 64}
SIZE_EMBEDDING = 256  # channels of each of SDXL's six size and crop numbers
AUTOENCODER_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True)
class Family:
    """How one published family encodes text; `text_encoders` as (name, layer, final norm, padding token)."""

    name: str
    latent_format: str
    text_encoders: tuple[tuple[str, int, bool, int], ...]


# By width of the text conditioning. SD 1.x: CLIP-L's last layer; 2.x: the last but one of ViT-H, through the final
# norm; XL: the last but one of CLIP-L and of ViT-bigG side by side, without the norm, and bigG's pooled vector.
FAMILIES = {
    768: Family("Stable Diffusion 1.x", "sd15", (("clip_l", -1, True, END_TOKEN),)),
    1024: Family("Stable Diffusion 2.x", "sd15", (("clip_h", -2, True, 0),)),
    2048: Family("Stable Diffusion XL", "sdxl", (("clip_l", -2, False, END_TOKEN), ("clip_g", -2, False, 0))),
}


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts: context [B, T, D], and SDXL's pooled vectors [B, P] or None."""

    context: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class ImageSize:
    """What SDXL is told about one image, in pixels: its size before resizing, where it was cropped, its size now.

    original (height, width), crop (top, left), target (height, width). Other families ignore it.
    """

    original: tuple[int, int]
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None


@dataclass(eq=False)
class Prior:
    """A prior and everything around it that training, previews and the finished file need.

    unet: its weights, LDM keys without prefix, in the number format of their file (fp8 as fp16); config: their
    architecture. schedule, prediction_type ("epsilon", "v_prediction", "sample"), zero_snr: its noise. latent_format:
    "sd15", "sdxl" or "mini_world"; latent_scale: the factor above; vae_id: SHA-256 of the autoencoder and the factor.
    null_context: the empty prompt. text: encodes prompts, None where no tokenizer is at hand. name: what to call the
    base in messages. Everything is on the CPU until `on` moves it.
    """

    name: str
    unet: dict[str, Tensor]
    config: UNetConfig
    schedule: NoiseSchedule
    prediction_type: str
    zero_snr: bool
    latent_format: str
    latent_scale: float
    null_context: NullContext
    autoencoder: Autoencoder
    text: Callable[[Sequence[str]], Text] | None = None
    notes: tuple[str, ...] = ()
    path: Path | None = None

    @classmethod
    def from_parts(
        cls,
        unet: Mapping[str, Tensor],
        config: UNetConfig,
        *,
        latent_format: str,
        prediction_type: str,
        zero_snr: bool,
        null_context: NullContext,
        autoencoder: Mapping[str, Tensor],
        latent_scale: float | None = None,
        text: Callable[[Sequence[str]], Text] | None = None,
        name: str = "prior",
    ) -> Prior:
        """A base from parts that are already in memory, for instance those of ComfyUI's MODEL, CLIP and VAE.

        unet and autoencoder: LDM keys without prefix. latent_scale: None is the factor of the published family that
        `latent_format` names. text: encodes prompts, None when there are none to encode. Raises ValueError.
        """
        if latent_scale is None:
            if latent_format not in LATENT_SCALES:
                raise Problem(
                    f"{name}: expected the scale of the latent space '{latent_format}', found none; give latent_scale."
                )
            latent_scale = LATENT_SCALES[latent_format]
        with torch.inference_mode(False):
            # Tensors made under inference mode, as ComfyUI's nodes make them, could never be trained: copy those.
            weights = {key: _trainable(tensor) for key, tensor in unet.items()}
            network = _load_autoencoder({key: _trainable(tensor) for key, tensor in autoencoder.items()}, name)
            base = cls(
                name,
                weights,
                config,
                NoiseSchedule.scaled_linear(zero_snr=zero_snr),
                prediction_type,
                zero_snr,
                latent_format,
                latent_scale,
                null_context,
                network,
                text,
            )
        _refuse_unsuited(base.config, name)
        check_unet(base.unet, base.config, name)
        return base

    @cached_property
    def prior_hash(self) -> str:
        """`prior_content_hash` of the UNet, which names the prior in a domain file."""
        return prior_content_hash(self.unet)

    @cached_property
    def vae_id(self) -> str:
        """SHA-256 over the autoencoder's weights, number formats included, and the scale: what latents depend on."""
        digest = hashlib.sha256(f"{self.latent_scale!r}\n{self.autoencoder.config.to_dict()}\n".encode())
        for key, tensor in sorted(self.autoencoder.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return self.autoencoder.config.factor

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.config.embed_dim

    @property
    def native_resolution(self) -> int | None:
        """The side in pixels of the images it was made for, None where that is unknown."""
        return native_resolution(self.latent_format, self.config.context_dim, self.prediction_type == "v_prediction")

    @property
    def null_text(self) -> Text:
        """The empty prompt as encoded text."""
        return Text(self.null_context.tensor, self.null_context.pooled)

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[Prior]:
        """The autoencoder on `device` for a while, then back where it was, so that training has the memory."""
        before = next(self.autoencoder.parameters()).device
        self.autoencoder.to(device)
        try:
            yield self
        finally:
            self.autoencoder.to(before)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in -1..1 -> mean and standard deviation of their scaled latents, fp32 [B, C, h, w] each.

        Runs in fp32 (SDXL's autoencoder overflows in fp16) where the autoencoder is (`on`); H and W are multiples of
        `factor`. Raises ValueError for other sizes and FileProblem when the autoencoder overflows.
        """
        where = next(self.autoencoder.parameters()).device
        mean, logvar = self.autoencoder.encode(images.to(where, torch.float32))
        if not bool(mean.isfinite().all()):
            raise FileProblem(
                f"{self.name}: expected finite latents, found NaN or infinity from its autoencoder; give another one "
                "as vae."
            )
        scaled = mean * self.latent_scale, (0.5 * logvar).exp() * self.latent_scale
        return scaled[0].to(images.device), scaled[1].to(images.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> images [B, 3, H, W] in -1..1, fp32, one image at a time to save memory."""
        where = next(self.autoencoder.parameters()).device
        unscaled = (latents.float() / self.latent_scale).to(where)
        return torch.cat([self.autoencoder.decode(one).clamp(-1, 1) for one in unscaled.split(1)]).to(latents.device)

    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Prompts -> encoded text [B, T, D]. Empty prompts always work; others need a tokenizer, else ValueError."""
        prompts = list(prompts)
        self.check_prompts(prompts)
        if any(prompts):
            return self.text(prompts)
        pooled = self.null_context.pooled
        return Text(
            self.null_context.tensor.expand(len(prompts), -1, -1),
            None if pooled is None else pooled.expand(len(prompts), -1),
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError where `encode_text` could not encode these prompts, without encoding them."""
        if self.text is None and any(prompts):
            raise Problem(
                f"{self.name}: expected a tokenizer to encode the prompt {next(filter(None, prompts))!r}, found none; "
                "set tokenizer to a folder with CLIP's vocab.json and merges.txt (in ComfyUI: comfy/sd1_tokenizer)."
            )

    def vector(
        self,
        height: int,
        width: int,
        crop: tuple[int, int] = (0, 0),
        target: tuple[int, int] | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor | None:
        """SDXL's vector conditioning y [1, A] (arXiv 2307.01952, section 2.2), None for families without one.

        height, width: of the original image in pixels; crop: (top, left); target: (height, width) after resizing and
        cropping, None for the original's. pooled [1, P] comes first; None puts zeros there, which is right for
        text-free UNets, whose weights for it are zero.
        """
        if self.config.adm_in_channels is None:
            return None
        numbers = (height, width, *crop, *(target or (height, width)))
        sizes = timestep_embedding(torch.tensor(numbers, dtype=torch.float32), SIZE_EMBEDDING).reshape(1, -1)
        if pooled is None:
            pooled = torch.zeros(1, self.config.adm_in_channels - sizes.shape[1])
        return torch.cat([pooled.to("cpu", torch.float32), sizes], dim=1)

    def conditioning(self, sizes: Sequence[ImageSize], text: Text | None = None) -> dict[str, Tensor]:
        """Keyword arguments of the UNet for a batch of images: context [B, T, D] and y [B, A], where it takes them.

        text: one prompt for all ([1, T, D]) or one per image; None for a text-free UNet.
        """
        arguments: dict[str, Tensor] = {}
        if text is not None:
            arguments["context"] = text.context.expand(len(sizes), -1, -1)
        if self.config.adm_in_channels is not None:
            pooled = None if text is None or text.pooled is None else text.pooled.expand(len(sizes), -1)
            arguments["y"] = torch.cat(
                [
                    self.vector(*size.original, size.crop, size.target, None if pooled is None else pooled[i : i + 1])
                    for i, size in enumerate(sizes)
                ]
            )
        return arguments

    def load_prior(self, dtype: torch.dtype = torch.float32) -> UNet:
        """The untouched prior as a module in evaluation mode; weights already in `dtype` are shared, not copied."""
        with torch.inference_mode(False):
            return load_unet(self.unet, self.config, dtype)


def native_resolution(latent_format: str, context_dim: int | None, is_v: bool) -> int | None:
    """The side in pixels of the images a model was made for; None where its latents are no published family's.

    context_dim: width of its text; is_v: whether it predicts v. Both together tell Stable Diffusion 2.x at 768 px.
    """
    if latent_format == "sd15" and context_dim == 1024 and is_v:
        return 768
    return NATIVE_RESOLUTION.get(latent_format)


def open_base(config: TrainConfig) -> Prior:
    """The base that a configuration names: `config.base`, with `config.vae`, `config.tokenizer`, `config.prediction`.

    Raises FileProblem for a file that cannot be trained from, ValueError for options that do not fit it.
    """
    prediction = getattr(config, "prediction", "auto")
    if config.base.startswith(CONNECTED_BASE):
        raise ConfigProblem(
            f"base: expected a checkpoint file or mini_world, found '{config.base}', models that were connected in "
            "ComfyUI; continue there, or give --base FILE with the checkpoint that they came from."
        )
    with torch.inference_mode(False):
        if config.base == MINI_WORLD:
            if config.vae:
                raise ConfigProblem(f"vae: expected none for the mini world, which has its own, found {config.vae}.")
            return open_mini_world(prediction)
        return open_checkpoint(config.base, vae=config.vae, tokenizer=config.tokenizer, prediction=prediction)


def open_mini_world(prediction: str = "auto") -> Prior:
    """The shipped miniature as a base; it is an epsilon model and has its own words."""
    from ..mini_world.assets import LATENT_FORMAT, load_autoencoder, load_prior, load_text_encoder
    from ..mini_world.tokens import tokenize

    if prediction not in ("auto", "epsilon"):
        raise Problem(f"Expected prediction auto or epsilon for the mini world, got {prediction!r}.")
    autoencoder, scale = load_autoencoder()
    encoder, _ = load_text_encoder()
    weights, config = load_prior()

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Text:
        return Text(encoder(torch.stack([tokenize(prompt) for prompt in prompts]))[0])

    description = {"text_encoder": "mini_world", "layer": "-1", "empty": "encoded empty prompt"}
    null = NullContext(encode([""]).context, description)
    return Prior(
        "the mini world",
        weights,
        config,
        NoiseSchedule.scaled_linear(),
        "epsilon",
        False,
        LATENT_FORMAT,
        scale,
        null,
        autoencoder,
        encode,
    )


def open_checkpoint(path: str | os.PathLike, *, vae: str = "", tokenizer: str = "", prediction: str = "auto") -> Prior:
    """A full checkpoint of Stable Diffusion 1.x, 2.x or XL (`.safetensors`, LDM layout) as a base.

    vae: another file to take the autoencoder from ("" keeps the checkpoint's). tokenizer: folder with vocab.json and
    merges.txt, needed only for prompts that are not empty. prediction: "auto" believes the file's markers; where a
    2.x file has none its UNet is measured (`measured_prediction`), all others count as epsilon, as in ComfyUI, with a
    note where a 1.x file measures otherwise. The text encoders are read when needed and let go again. Raises
    FileProblem and ValueError.
    """
    if prediction not in PREDICTIONS:
        raise Problem(f"Expected prediction to be one of {', '.join(PREDICTIONS)}, got {prediction!r}.")
    path = Path(path)
    file = ModelFile(path)
    keys, metadata = file.keys, file.metadata
    if unet_layout(keys, path, wanted=BASE, metadata=metadata) != "full":
        raise FileProblem(
            f"{path}: expected the checkpoint of a prior, found a text-free UNet; train from the checkpoint it was "
            "made of."
        )
    kind = recognise_names(keys, metadata)
    if kind.group in ("quantised", "unet", "domain"):
        raise FileProblem(refusal_of(path, BASE, kind))
    state_dict = file.tensors(unet_prefix(keys))
    del file  # of a pickle it holds all of the content
    weights = {key: _trainable(tensor) for key, tensor in strip_unet_prefix(state_dict).items()}
    del state_dict
    try:
        config = unet_config_from_state_dict(weights)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise FileProblem(
            f"{path}: its architecture cannot be read ({str(error).rstrip('.')}); use Stable Diffusion 1.x, 2.x or XL."
        ) from error
    _refuse_unsuited(config, path)
    family = FAMILIES[config.context_dim]
    for marker in ("edm_mean", "edm_vpred.sigma_max"):
        if marker in keys:
            raise FileProblem(
                f"{path}: expected an eps- or v-model on Stable Diffusion's noise schedule, found an EDM model "
                f"(marker {marker}), whose noise is another; use another base."
            )
    check_unet(weights, config, path)
    check_finite(weights, path)
    network = _load_autoencoder(_read_autoencoder(Path(vae) if vae else path), vae or path)
    encoders = TextEncoders(path, family, tokenizer)
    null = encoders.encode_empty()
    _check_width(path, family, config, null)

    notes: list[str] = []
    zero_snr = prediction == "v_prediction_zero_snr" or (prediction == "auto" and "ztsnr" in keys)
    if prediction == "auto":
        prediction = _stated_prediction(keys, metadata) or _unstated_prediction(path, weights, config, null, notes)
    if "ztsnr" in keys and not zero_snr:
        notes.append(
            f"{path.name} says that it was trained to zero SNR (marker ztsnr), and prediction asks for {prediction} on "
            "the plain schedule; v_prediction_zero_snr takes it as it says."
        )
    elif zero_snr and prediction == "epsilon":
        # The last step of zero SNR shows the noise itself: there an epsilon model has nothing to predict.
        zero_snr = False
        notes.append(
            f"{path.name} has the marker of zero SNR (ztsnr) but not that of v-prediction (v_pred): it is taken for an "
            "epsilon model on the plain schedule. Set prediction to v_prediction_zero_snr if it is a v-model."
        )
    return Prior(
        path.name,
        weights,
        config,
        NoiseSchedule.scaled_linear(zero_snr=zero_snr),
        prediction.removesuffix("_zero_snr"),
        zero_snr,
        family.latent_format,
        LATENT_SCALES[family.latent_format],
        null,
        network,
        encoders.encode if tokenizer else None,
        tuple(notes),
        path,
    )


def _unstated_prediction(
    path: Path, weights: Mapping[str, Tensor], config: UNetConfig, null: NullContext, notes: list[str]
) -> str:
    """The prediction type of a file that does not state it; what to know about that goes into `notes`."""
    if config.adm_in_channels is not None:
        return "epsilon"  # SDXL: its v-models are marked, and measuring one takes 10 GB
    measured, agreement = measured_prediction(weights, config, null.tensor)
    why = f"its output on pure noise agrees with the noise to {agreement:.2f}; near 1 is epsilon"
    if config.context_dim == 1024:
        notes.append(
            f"{path.name} does not state its prediction type; measured {measured} ({why}). Set prediction to overrule "
            "it."
        )
        return measured
    if measured != "epsilon":
        # Unmarked 1.x files count as epsilon in ComfyUI, which draws with what is trained here.
        notes.append(
            f"{path.name} does not state its prediction type and is taken for an epsilon model, as ComfyUI takes it, "
            f"but looks like {measured} ({why}). Set prediction to {measured} if it is such a model."
        )
    return "epsilon"


@torch.no_grad()
def measured_prediction(
    weights: Mapping[str, Tensor], config: UNetConfig, context: Tensor, side: int = 16
) -> tuple[str, float]:
    """("epsilon" | "v_prediction", how well the output on pure noise agrees with that noise).

    At the last timestep an epsilon model is asked for the very noise it sees, so the cosine of input and output is
    near 1; a v-model (arXiv 2202.00512) is asked for minus the image, which has nothing to do with the noise. One
    forward pass over 4 latents of `side` squared; for models without vector conditioning.
    """
    unet = load_unet(weights, config)
    noise = torch.randn(4, config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    output = unet(noise, torch.full((4,), 999.0), context=context.float().expand(4, -1, -1))
    agreement = float(torch.nn.functional.cosine_similarity(output.flatten(), noise.flatten(), dim=0))
    return ("epsilon" if agreement > 0.5 else "v_prediction"), agreement


class TextEncoders:
    """The text encoders of one checkpoint, read from the file for each use: SDXL's alone take 3 GB in fp32.

    tokenizer: folder with CLIP's vocab.json and merges.txt, "" for none.
    """

    def __init__(self, path: Path, family: Family, tokenizer: str = "") -> None:
        self.path = path
        self.family = family
        self.tokenizer = _load_tokenizer(tokenizer) if tokenizer else None

    def encode_empty(self) -> NullContext:
        """The empty prompt; needs no tokenizer."""
        text = self._encode(lambda encoder, pad: empty_prompt_tokens(encoder.config, pad))
        description = {
            "text_encoder": "+".join(name for name, *_ in self.family.text_encoders),
            "layer": ",".join(str(layer) for _, layer, *_ in self.family.text_encoders),
            "empty": "encoded empty prompt",
        }
        return NullContext(text.context, description, text.pooled)

    def encode(self, prompts: Sequence[str]) -> Text:
        """Prompts -> encoded text; each cut after 75 tokens, weights in brackets are read as words."""
        if self.tokenizer is None:
            raise Problem("Expected a tokenizer to encode prompts, found none; set tokenizer.")
        ids = [self.tokenizer(prompt) for prompt in prompts]

        def tokens(encoder: TextEncoder, pad: int) -> Tensor:
            length = encoder.config.max_length
            rows = [[START_TOKEN, *row[: length - 2], END_TOKEN] for row in ids]
            return torch.tensor([row + [pad] * (length - len(row)) for row in rows])

        return self._encode(tokens)

    @torch.no_grad()
    def _encode(self, tokens: Callable[[TextEncoder, int], Tensor]) -> Text:
        """Every encoder of the family on its tokens, one at a time in fp32."""
        contexts, pooled = [], None
        for name, layer, final_norm, pad in self.family.text_encoders:
            encoder = self._load(name)
            # Files that went through diffusers lack ViT-H's last layer, which nothing uses: there -1 is the same layer.
            skipped = name == "clip_h" and encoder.config.layers == 23
            hidden, projected = encoder(tokens(encoder, pad), -1 if skipped else layer, final_norm)
            contexts.append(hidden)
            if self.family.latent_format == "sdxl":
                pooled = projected  # the last encoder's
        return Text(torch.cat(contexts, dim=-1), pooled)

    def _load(self, name: str) -> TextEncoder:
        prefixes = [prefix for prefix, kind, _ in TEXT_ENCODER_PREFIXES if kind == name]
        file = ModelFile(self.path)
        for prefix in prefixes:
            if not any(key.startswith(prefix) for key in file.keys):
                continue
            part = file.tensors(prefix)
            weights = split_checkpoint({prefix + key: tensor for key, tensor in part.items()}).text_encoders[name]
            return self._build(name, weights)
        raise FileProblem(
            f"{self.path}: expected a full checkpoint of {self.family.name} with its text encoder {name}, found none; "
            "the empty prompt has to be encoded once, so use a checkpoint that has UNet, VAE and text encoder."
        )

    def _build(self, name: str, weights: Mapping[str, Tensor]) -> TextEncoder:
        check_finite(weights, self.path)
        named = {  # files of 2022 leave out the first part
            key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
            for key, tensor in weights.items()
        }
        named.pop("text_model.embeddings.position_ids", None)
        named.pop("text_model.logit_scale", None)
        try:
            config = text_encoder_config_from_state_dict(named)
            with torch.device("meta"):
                encoder = TextEncoder(config)
            encoder.load_state_dict({key: tensor.float() for key, tensor in named.items()}, strict=True, assign=True)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise FileProblem(
                f"{self.path}: its text encoder {name} cannot be read ({str(error).splitlines()[0].rstrip('.')}); "
                "download the file again."
            ) from error
        return encoder.eval().requires_grad_(False)


def _load_tokenizer(folder: str) -> Callable[[str], list[int]]:
    """CLIP's byte-pair encoder from a folder, as a function from text to ids without start and end."""
    files = [Path(folder) / name for name in ("vocab.json", "merges.txt")]
    for file in files:
        if not file.is_file():
            raise FileProblem(f"{file}: expected CLIP's tokenizer file, found nothing; name the folder that holds it.")
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise Problem(
            "Expected the package transformers to read a tokenizer, found none; install it, or leave prompts empty."
        ) from error
    tokenizer = CLIPTokenizer(*map(str, files))
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def _trainable(tensor: Tensor) -> Tensor:
    """On the CPU, fit for autograd, fp8 as fp16 (exactly); shared with the input where it can be."""
    tensor = tensor.detach()
    if tensor.dtype in FLOAT8:
        tensor = tensor.half()
    return tensor.clone().cpu() if tensor.is_inference() else tensor.cpu()


def _refuse_unsuited(config: UNetConfig, source: str | os.PathLike) -> None:
    """Priors that this trainer cannot learn from, each with its reason."""
    if config.in_channels != config.out_channels:
        raise FileProblem(
            f"{source}: expected a text-to-image model, found one with {config.in_channels} input channels (inpainting "
            "or editing), which would need masks to train on; use the family's text-to-image model."
        )
    if config.context_dim == 1280 and config.adm_in_channels in POOLED_TEXT_ADM:
        raise FileProblem(f"{source}: expected a base model, found the SDXL refiner; train from the SDXL base model.")
    if config.context_dim in FAMILIES and (config.adm_in_channels is not None) != (config.context_dim == 2048):
        raise FileProblem(
            f"{source}: expected {FAMILIES[config.context_dim].name}, found vector conditioning of "
            f"{config.adm_in_channels} channels (unCLIP), which images alone do not give; use a text-to-image model."
        )


def _check_width(path: Path, family: Family, config: UNetConfig, null: NullContext) -> None:
    if null.tensor.shape[2] != config.context_dim:
        raise FileProblem(
            f"{path}: expected text of width {config.context_dim} for its UNet ({family.name}), found text encoders of "
            f"width {null.tensor.shape[2]}; the parts of this file do not belong together."
        )


def _stated_prediction(keys: Sequence[str], metadata: Mapping[str, str]) -> str | None:
    """What a file says about its prediction type: v-models' marker key, or the ModelSpec field."""
    if "v_pred" in keys:
        return "v_prediction"
    stated = metadata.get("modelspec.prediction_type", "").lower()
    return {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(stated)


def _read_autoencoder(path: Path) -> dict[str, Tensor]:
    """An autoencoder's weights, keys without prefix, from a checkpoint or a file of its own."""
    file = ModelFile(path)
    prefix = AUTOENCODER_PREFIX if any(key.startswith(AUTOENCODER_PREFIX) for key in file.keys) else ""
    if not any(key.startswith(f"{prefix}encoder.") for key in file.keys):
        raise FileProblem(refusal(path, AUTOENCODER, file.keys, file.metadata))
    return file.tensors(prefix)


def _load_autoencoder(weights: Mapping[str, Tensor], source: str | os.PathLike) -> Autoencoder:
    """The module in fp32; extra tensors (losses, averages) are left out, linear attention becomes 1x1 convolution."""
    plain: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if key.startswith(AUTOENCODER_PARTS):
            is_linear = ".attn_1." in key and tensor.ndim == 2
            plain[key] = (tensor[..., None, None] if is_linear else tensor).float()
    check_finite(plain, source)
    try:
        with torch.device("meta"):
            network = Autoencoder(autoencoder_config_from_state_dict(plain))
        network.load_state_dict(plain, strict=True, assign=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise FileProblem(
            f"{source}: its autoencoder cannot be read ({str(error).splitlines()[0].rstrip('.')}); name another file "
            "as vae."
        ) from error
    return network.eval().requires_grad_(False)
