"""The standalone guidance library: multi-guidance on any denoisers, without ComfyUI.

Importing it costs nothing; a public name is loaded from its module when first used. Guidance presets are functions of
`guidance.presets`; shapings and distillation methods are made by name (`make_shaping`, `make_method`).
"""

from importlib import import_module
from typing import Any

_MODULE_OF_NAME = {
    name: module
    for module, names in {
        "errors": ("GuidanceError",),
        "schedules": ("Constant", "Interval", "Keyframes", "Weight", "as_weight", "weight_from_json"),
        "terms": ("Source", "Term"),
        "shaping": ("InOrder", "Shaping"),
        "shapings": ("make_shaping",),
        "combination": ("Guidance", "Step", "combine"),
        "multi_guidance": ("MultiGuidance",),
        "sampling": ("sample", "sigmas_karras", "sigmas_sgm_uniform", "sigmas_uniform"),
        "diffusion": ("Denoiser", "NoiseSchedule"),
        "probes": ("Probes", "collect_probes", "unconditional_error"),
        "null_text": ("NullContext", "build_cached", "build_constant", "load_unet"),
        "distillation.critic": ("Critic",),
        "distillation.method": ("Method",),
        "distillation.methods": ("make_method",),
        "distillation.directional": ("Directional",),
        "distillation.reconstruction": ("Reconstruction",),
        "distillation.perceptual": ("FeatureDistance", "Perceptual", "lpips_distance"),
        "distillation.timesteps": ("Timesteps",),
        "distillation.image_encoder": ("ImageEncoder",),
        "distillation.layer_selection": ("rank_layers", "select_layers"),
        "distillation.context": ("Draws",),
        "distillation.objective": ("NotFinite", "Objective", "Report"),
        "networks.unet": ("UNet",),
        "networks.low_rank": ("add_low_rank", "merged_weights", "without_additions"),
        "networks.unet_config": ("UNetConfig", "unet_config_from_state_dict"),
        "networks.text_encoder": (
            "TextEncoder",
            "TextEncoderConfig",
            "empty_prompt_tokens",
            "text_encoder_config_from_state_dict",
            "text_encoder_from_openclip",
        ),
        "networks.autoencoder": ("Autoencoder", "AutoencoderConfig", "autoencoder_config_from_state_dict"),
        "networks.stylegan2": ("StyleGAN2", "random_generator"),
        "networks.stylegan2_config": ("GeneratorConfig", "generator_config_from_state_dict", "standard_channels"),
        "networks.blending": ("blend_generators", "resolution_split"),
        "files": (
            "DomainMetadata",
            "FileProblem",
            "GeneratorMetadata",
            "LoadedGenerator",
            "add_lora",
            "convert_generator",
            "lora_tensors",
            "prior_content_hash",
            "read_domain_file",
            "read_generator",
            "read_lora",
            "read_state_dict",
            "write_domain_file",
            "write_generator",
            "write_safetensors",
        ),
    }.items()
    for name in names
}

__all__ = sorted(_MODULE_OF_NAME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF_NAME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
