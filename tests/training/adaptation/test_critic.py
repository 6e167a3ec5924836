"""The critic of an adaptation: the configured guidance, the encoder with a gradient, parts that do not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.training.adaptation.critic import judged_resolution, latent_encoder, make_objective, open_critic
from indomain_guidance.training.engine.settings import ConfigProblem
from indomain_guidance.training.mini_world.assets import domain_unets_dir
from indomain_guidance.training.prior.opening import open_mini_world

DOMAIN = str(domain_unets_dir() / "mini-handwriting.safetensors")


@pytest.fixture(scope="module")
def mini():
    return open_mini_world()


@pytest.fixture
def configure(tiny_adaptation, tmp_path):
    def make(**changes):
        fields = {"base": "mini_world", "prompt": "a red seven on a yellow background", "scale": 5.0, **changes}
        return tiny_adaptation.tiny_config(tmp_path, **fields)

    return make


def predicted(base, prompt, z_t, t):
    """The prior's own noise prediction, straight from its network."""
    with torch.no_grad():
        return base.load_unet()(z_t, t, context=base.encode_text([prompt]).context)


def test_it_is_the_guidance_that_the_configuration_describes(mini, configure):
    """e_u + s (e_c - e_u) + w (e_domain - e_u), e_u on the negative prompt."""
    config = configure(negative="a blue digit", domain=DOMAIN, domain_weight=1.5)
    critic = open_critic(config, mini, 64, "cpu")
    z_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    found = critic.predict(z_t, t)
    e_u, e_c = predicted(mini, config.negative, z_t, t), predicted(mini, config.prompt, z_t, t)
    alone = open_critic(configure(prompt="", domain=DOMAIN, domain_weight=1.0), mini, 64, "cpu")
    e_d = alone.predict(z_t, t, ("e",)).e
    assert torch.allclose(found.e_u, e_u, atol=1e-4)
    assert torch.allclose(found.e, e_u + 5.0 * (e_c - e_u) + 1.5 * (e_d - e_u), atol=1e-3)
    assert float((e_d - e_u).norm()) > 0.1 and [term.name for term in critic.guidance.terms] == ["domain", "control"]


def test_methods_get_their_prompts(mini, configure):
    z_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    critic = open_critic(configure(method="nfsd", negative="a blue digit"), mini, 64, "cpu")
    found = critic.predict(z_t, t, ("e_u", "e_unwanted"))
    assert torch.allclose(found.e_u, predicted(mini, "", z_t, t), atol=1e-4)
    assert torch.allclose(found.e_unwanted, predicted(mini, "a blue digit", z_t, t), atol=1e-4)
    config = configure(method="bridge", source_prompt="a white digit on a black background")
    found = open_critic(config, mini, 64, "cpu").predict(z_t, t, ("e_source_c",))
    assert torch.allclose(found.e_source_c, predicted(mini, config.source_prompt, z_t, t), atol=1e-4)


def test_the_second_critic_of_vsd_is_the_priors_on_the_prompt(mini, configure):
    """And the domain model's only where there is no prompt."""
    config = configure(method="vsd", domain=DOMAIN)
    critic = open_critic(config, mini, 64, "cpu")
    own = make_objective(config, critic, lambda images: images, "cpu").method.source
    assert own == critic.guidance.term("control").source and own.model is critic.guidance.base.model
    assert torch.equal(own.cond["context"], mini.encode_text([config.prompt]).context)
    config = configure(method="vsd", domain=DOMAIN, prompt="")
    critic = open_critic(config, mini, 64, "cpu")
    own = make_objective(config, critic, lambda images: images, "cpu").method.source
    assert own == critic.guidance.term("domain").source and own.model is not critic.guidance.base.model


def test_a_domain_model_of_another_latent_space_is_refused(tiny_run, configure):
    with pytest.raises(FileProblem, match="latent space 'tiny', found one for 'mini_world'"):
        open_critic(configure(base="tiny", prompt="", domain=DOMAIN), tiny_run.tiny_base(), 64, "cpu")


def test_the_encoder_is_the_bases_with_a_gradient(mini):
    encode = latent_encoder(mini, 64)
    images = (2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1).mul(1.2).requires_grad_()
    latents = encode(images)
    large = torch.nn.functional.interpolate(images.detach(), (64, 64), mode="bilinear", align_corners=False)
    assert latents.shape == (1, 4, 8, 8) and torch.allclose(latents, mini.encode(large.clamp(-1, 1))[0], atol=1e-5)
    latents.sum().backward()
    assert float(images.grad.abs().sum()) > 0
    with pytest.raises(ConfigProblem, match="resolution: expected a multiple of 8 px"):
        latent_encoder(mini, 60)


def test_images_are_judged_at_the_size_the_model_was_made_for(mini, configure, tiny_adaptation, tiny_run):
    generator, config = tiny_adaptation.tiny_generator(), configure()
    assert judged_resolution(config, mini, generator) == 64
    assert judged_resolution(config, dataclasses.replace(mini, latent_format="sdxl"), generator) == 1024
    wide = dataclasses.replace(mini.config, context_dim=1024)
    for prediction, side in (("epsilon", 512), ("v_prediction", 768)):
        second = dataclasses.replace(mini, latent_format="sd15", config=wide, prediction_type=prediction)
        assert judged_resolution(config, second, generator) == side
    assert judged_resolution(configure(resolution=128), mini, generator) == 128
    assert judged_resolution(config, tiny_run.tiny_base(), generator) == 16  # an unknown family: the generator's own
    assert judged_resolution(config, None, generator) == 16


def test_the_objective_is_what_the_configuration_says(mini, configure, tiny_adaptation):
    critic = tiny_adaptation.tiny_critic()
    objective = make_objective(configure(), critic, tiny_adaptation.shrink, "cpu")
    assert objective.method.name == "sds" and not objective.regularizers and objective.perceptual is None
    assert (objective.latent_clamp, objective.image_quantile, objective.mode) == (1.0, 0.95, "shared")
    config = configure(
        method="csd",
        directional=0.5,
        reconstruction=2.0,
        perceptual=0.3,
        features="latents",
        latent_clamp=0.0,
        image_quantile=0.0,
        mode="sgf",
        t_min=20,
        t_max=400,
        t_schedule="falling",
        weighting="sigma",
        sds_normalize=True,
    )
    objective = make_objective(config, critic, tiny_adaptation.shrink, "cpu")
    assert [(one.name, one.weight) for one in objective.regularizers] == [("directional", 0.5), ("reconstruction", 2.0)]
    assert objective.perceptual.weight == 0.3
    assert (objective.latent_clamp, objective.image_quantile, objective.mode) == (None, None, "sgf")
    timesteps = objective.timesteps
    assert (timesteps.t_min, timesteps.t_max, timesteps.schedule, objective.weighting) == (20, 400, "falling", "sigma")


@pytest.mark.parametrize("mode", ["shared", "sgf"])
@pytest.mark.parametrize("side", [16, 64, 96])
def test_the_gradient_of_images_is_that_of_what_is_judged(mini, configure, tiny_adaptation, mode, side):
    """Resized and clamped first, and only then given to the same objective, the gradient goes back by autograd."""
    config = configure(mode=mode, reconstruction=0.5, way_back=0.0)
    objective = make_objective(config, tiny_adaptation.tiny_critic((0.5, -0.5, 0.2, 0.1)), None, "cpu")
    encode = latent_encoder(mini, 64)
    raw, frozen = 2 * torch.randn(2, 1, 3, side, side, generator=torch.Generator().manual_seed(side))

    def gradient(images, others):
        randomness = torch.Generator().manual_seed(0)
        return objective.image_gradient(images, others, encode, step=0, steps=1, generator=randomness)[0]

    leaf = raw.clone().requires_grad_()
    judged, other = (
        torch.nn.functional.interpolate(one, (64, 64), mode="bilinear", align_corners=False).clamp(-1, 1)
        for one in (leaf, frozen)
    )
    judged.backward(gradient(judged.detach(), other))
    found = gradient(raw, frozen)
    assert 0.1 < float((judged.abs() == 1).float().mean()) < 0.8 and float(found.norm()) > 0
    assert torch.allclose(found, leaf.grad, rtol=1e-4, atol=1e-4 * float(leaf.grad.abs().max()))


@pytest.mark.parametrize("of_method", [False, True])
@pytest.mark.parametrize("of_regularizer", [False, True])
def test_method_and_regularizer_are_normalized_apart(configure, tiny_adaptation, of_method, of_regularizer):
    config = configure(directional=1.0, sds_normalize=of_method, normalize_directional=of_regularizer)
    objective = make_objective(config, tiny_adaptation.tiny_critic(), tiny_adaptation.shrink, "cpu")
    assert (objective.method.normalize, objective.regularizers[0].normalize) == (of_method, of_regularizer)


def test_pixels_find_back_but_in_the_released_update(configure, tiny_adaptation):
    """Black pixels of a critic that wants them lighter: what is left of the gradient."""
    critic, black = tiny_adaptation.tiny_critic((0.8, 0.8, 0.8)), torch.full((1, 3, 16, 16), -3.0)
    found = {}
    for mode in ("shared", "sgf"):
        for way_back in (-1.0, 0.0, 0.5, 1.0):
            config = configure(mode=mode, way_back=way_back)
            objective = make_objective(config, critic, tiny_adaptation.shrink, "cpu")
            randomness = torch.Generator().manual_seed(0)
            gradient, _ = objective.image_gradient(
                black, None, tiny_adaptation.shrink, step=0, steps=1, generator=randomness
            )
            found[mode, way_back] = float(gradient.norm())
    for mode, share in (("shared", 0.01), ("sgf", 0.0)):
        whole = found[mode, 1.0]
        left = [found[mode, way_back] / whole for way_back in (-1.0, 0.0, 0.5)]
        assert whole > 0 and left == pytest.approx([share, 0.0, 0.5])
