"""Settings of ``--config mini_world``: a first run of ``indomain train`` and of ``indomain adapt``."""

# About a minute on two cores.
FIRST_RUN = {
    "base": "mini_world",
    "name": "first",
    "resolution": 64,
    "steps": 200,
    "batch_size": 32,
    "learning_rate": 8e-4,
    "warmup": 20,
    "schedule": "cosine",
    "ema": 0.98,
    "noisy_share": 0.5,
    "domain_weight": 1.2,
    "control_weight": 3.0,
    "sample_prompts": ("a red seven on a yellow background", "a blue three on a white background"),
    "sample_every": 100,
    "validate_every": 100,
    "checkpoint_every": 100,
}
# About a minute on two cores. The generator draws in grey, so its colour layers have to be trained as well.
FIRST_ADAPTATION = {
    "generator": "mini_world",
    "base": "mini_world",
    "name": "first_adaptation",
    "prompt": "a yellow digit on a green background",
    "method": "csd",
    "scale": 7.5,
    "t_min": 300,
    "t_max": 900,
    "directional": 0.3,
    "latent_clamp": 0.0,
    "image_quantile": 0.0,
    "train": "synthesis",
    "freeze_bias": False,
    "steps": 150,
    "batch_size": 4,
    "learning_rate": 0.008,
    "ema": 0.95,
    "sample_every": 25,
}
