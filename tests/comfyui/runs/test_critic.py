"""The critic from a graph's objects: its predictions are core's, its encoder core's with a gradient."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

T = torch.tensor([700, 120])


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def internals(comfyui):
    return module("nodes.comfy_internals.runs.critic")


@pytest.fixture(scope="module")
def mini(comfyui):
    """(MODEL, CLIP, VAE) of the mini world, loaded under inference mode as the node does."""
    with torch.inference_mode():
        return module("nodes.comfy_internals.models.loading").load_mini_world()


@pytest.fixture
def ask(internals):
    """What a critic made of a graph says about z_t at timesteps T, as a node would ask: inference mode is on."""

    def run(model, positive, negative, z_t, needs=("e", "e_u", "e_c"), terms=(), scale=2.0, t=T, **others):
        with torch.inference_mode():
            guider = internals.PredictionGuider(model, positive, negative, scale, terms, others)

            def body(predictions):
                assert not torch.is_inference_mode_enabled()
                critic = predictions.critic(internals.noise_schedule(model))
                made = critic.predict(z_t, t, needs)
                assert not any(one.is_inference() for one in vars(made).values() if one is not None)
                return made, critic

            return guider.run(z_t.shape, [10.0, 0.5], body)

    return run


@pytest.fixture
def core_eps(tiny, internals):
    """The noise that core alone predicts for z_t at timesteps T on one conditioning, image by image."""

    def predict(model, conditioning, z_t):
        schedule, parts = internals.noise_schedule(model), []
        for one, t in zip(z_t.split(1), T.tolist()):
            sigma, x = schedule.sigma(float(t)), one / schedule.alphas_cumprod[t].sqrt()
            parts.append((x - tiny.denoised(model, conditioning, x, sigma)) / sigma)
        return torch.cat(parts)

    return predict


@pytest.fixture
def x(tiny):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION"])
def test_predictions_are_cores_for_every_image_at_its_own_noise(tiny, ask, core_eps, x, prediction):
    with torch.inference_mode():
        model = tiny.prior(prediction=prediction)
        positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    made, critic = ask(model, positive, negative, x)
    base, prompt = core_eps(model, negative, x), core_eps(model, positive, x)
    assert error(made.e_u, base) < 1e-5 and error(made.e_c, prompt) < 1e-5
    assert error(made.e, base + 2.0 * (prompt - base)) < 1e-5
    # Both conditionings of both images in one call.
    assert (critic.calls, critic.samples) == (1, 4)


def test_loras_hooks_and_further_judges_act_as_in_sampling(tiny, ask, core_eps, x):
    with torch.inference_mode():
        plain = tiny.prior()
        model = tiny.lora(plain, seed=8)
        positive, negative = tiny.conditioning(1), tiny.conditioning(2)
        domain = tiny.cached_domain(plain, torch.randn(1, 77, 24, generator=torch.Generator().manual_seed(3)), seed=4)
    term = module("nodes.comfy_internals.guiding.guider").Term("domain", domain, None, 1.5)
    made, critic = ask(model, positive, negative, x, terms=(term,))
    base, prompt, own = (core_eps(m, c, x) for m, c in ((model, negative), (model, positive), (domain, negative)))
    assert error(base, core_eps(plain, negative, x)) > 0.01
    assert error(made.e, base + 2.0 * (prompt - base) + 1.5 * (own - base)) < 1e-5
    assert [one.name for one in critic.guidance.terms] == ["domain", "prompt"]
    # Last is the prompt: the second critic of variational score distillation is the prior's on it.
    second = module("guidance.distillation.vsd").VSD.of(critic, 0).source
    assert second == critic.guidance.term("prompt").source and second.model.unet is model.model.diffusion_model
    # Afterwards the graph's models are as they were.
    assert error(core_eps(plain, negative, x), base) > 0.01


def test_what_acts_on_some_noise_levels_only_acts_for_each_image(tiny, ask, core_eps, x, internals):
    model, positive, negative = tiny.prior(), tiny.conditioning(1), tiny.conditioning(2)
    # Two prompts that take turns halfway, between the two timesteps asked for.
    late = tiny.conditioning(3)
    turns = [
        *tiny.with_options(positive, start_percent=0.0, end_percent=0.5),
        *tiny.with_options(late, start_percent=0.5, end_percent=1.0),
    ]
    made, _ = ask(model, turns, negative, x, ("e_c",))
    assert error(made.e_c[:1], core_eps(model, positive, x)[:1]) < 1e-5
    assert error(made.e_c[1:], core_eps(model, late, x)[1:]) < 1e-5
    # And so do the terms' own intervals.
    schedules, guider = module("guidance.schedules"), module("nodes.comfy_internals.guiding.guider")
    term = guider.Term("late", None, late, schedules.Interval(3.0, 0.5, 1.0))
    made, _ = ask(model, positive, negative, x, ("e",), terms=(term,))
    base, prompt, third = (core_eps(model, cond, x) for cond in (negative, positive, late))
    expected = base + 2.0 * (prompt - base) + torch.tensor([0.0, 3.0])[:, None, None, None] * (third - base)
    assert error(made.e, expected) < 1e-5


def test_a_judge_says_nothing_where_its_conditioning_covers_nothing(tiny, ask, core_eps, x, internals):
    model, domain, positive, negative = tiny.prior(), tiny.prior(1), tiny.conditioning(1), tiny.conditioning(2)
    mask = torch.zeros(1, 8 * x.shape[-2], 8 * x.shape[-1])
    half = x.shape[-2] // 2
    mask[:, : 8 * half] = 1.0
    term = module("nodes.comfy_internals.guiding.guider").Term
    limited = tiny.with_options(negative, mask=mask, mask_strength=1.0)
    made, _ = ask(model, positive, negative, x, ("e",), terms=(term("domain", domain, limited, 1.5),))
    base, prompt, own = (core_eps(m, c, x) for m, c in ((model, negative), (model, positive), (domain, negative)))
    expected = base + 2.0 * (prompt - base)
    expected[:, :, :half] += 1.5 * (own - base)[:, :, :half]
    assert error(made.e, expected) < 1e-5
    # The first of the two timesteps lies before the range.
    limited = tiny.with_options(negative, start_percent=0.5, end_percent=1.0)
    made, _ = ask(model, positive, negative, x, ("e",), terms=(term("domain", domain, limited, 1.5),))
    expected = base + 2.0 * (prompt - base)
    expected[1:] += 1.5 * (own - base)[1:]
    assert error(made.e, expected) < 1e-5


def test_methods_conditionings_are_asked_for_and_are_no_terms(tiny, ask, core_eps, x):
    model, positive, negative = tiny.prior(), tiny.conditioning(1), tiny.conditioning(2)
    source, unwanted = tiny.conditioning(3), tiny.conditioning(4)
    needs = ("e", "e_unwanted", "e_source", "e_source_c")
    made, critic = ask(model, positive, negative, x, needs, source=source, unwanted=unwanted)
    base, prompt, now, bad = (core_eps(model, cond, x) for cond in (negative, positive, source, unwanted))
    assert error(made.e, base + 2.0 * (prompt - base)) < 1e-5
    assert error(made.e_source, base + 2.0 * (now - base)) < 1e-5 and error(made.e_source_c, now) < 1e-5
    assert error(made.e_unwanted, bad) < 1e-5
    assert len(critic.guidance.terms) == 1 and (critic.calls, critic.samples) == (1, 8)
    # Nothing stands in for what is not connected.
    _, critic = ask(model, positive, negative, x)
    assert critic.unwanted is None and critic.source is None


# ---- images to latents ------------------------------------------------------------------------------------------


@pytest.fixture
def inside(mini):
    """The mini world's VAE as ComfyUI's own loaders make one: every weight an inference tensor."""
    vae = copy.copy(mini[2])
    with torch.inference_mode():
        vae.first_stage_model = copy.deepcopy(vae.first_stage_model)
    assert all(one.is_inference() for one in vae.first_stage_model.parameters())
    return vae


def test_the_encoder_says_what_cores_says_and_has_its_gradient(mini, inside, internals):
    model = mini[0]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 1.8 - 0.9
    with torch.inference_mode():
        expected = model.model.process_latent_in(mini[2].encode((images * 0.5 + 0.5).permute(0, 2, 3, 1)))
    encode = internals.gradient_encoder(inside, model, torch.device("cpu"), 64)
    leaf = images.clone().requires_grad_()
    latents = encode(leaf)
    assert error(latents.detach(), expected.clone()) < 1e-5
    probe = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((latents * probe).sum(), leaf)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    step = 1e-3
    with torch.no_grad():
        change = (encode(images + step * direction) - encode(images - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float((change * probe).sum()), rel=2e-2)
    # The graph's own VAE is as it was, and whole.
    assert all(one.is_inference() for one in inside.first_stage_model.parameters())
    assert hasattr(inside.first_stage_model, "decoder")


def test_the_encoder_resizes_clamps_and_takes_grey_images(mini, internals):
    encode = internals.gradient_encoder(mini[2], mini[0], torch.device("cpu"), 64)
    grey = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 4 - 2
    wide = torch.nn.functional.interpolate(grey, (64, 64), mode="bilinear").clamp(-1, 1).expand(-1, 3, -1, -1)
    assert error(encode(grey), encode(wide)) < 1e-6


# ---- steps of a distillation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sds", "vsd"])
def test_a_step_on_a_model_from_comfyuis_own_loaders(mini, inside, internals, name):
    """Both the critic's weights and the encoder's are inference tensors; vsd trains through the critic's."""
    prior, clip, _ = mini
    with torch.inference_mode():
        model = prior.clone()
        # Newer versions of core give a model's configuration no way to be copied.
        config = prior.model.model_config
        model.model = copy.deepcopy(prior.model, {id(config): config})
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red seven", ""))
    assert all(one.is_inference() for one in model.model.parameters())
    guidance = importlib.import_module("indomain_guidance.guidance")
    inputs = internals.CriticInputs(model, inside, positive, negative, scale=7.5)
    leaf = torch.zeros(2, 3, 64, 64, requires_grad=True)

    def body(critic, encode):
        method = guidance.make_method(name, critic)
        objective = guidance.Objective(critic, method, timesteps=guidance.Timesteps(100, 500))
        return objective.backward(leaf * 1.0, None, encode, step=0, steps=1, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        report = inputs.run(64, 2, (100, 500), body, learns=name == "vsd")
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and float(leaf.grad.norm()) > 0
    assert set(report.loss) == {"sds"} if name == "sds" else set(report.loss) == {"vsd", "vsd_critic"}
    assert all(one.is_inference() for one in model.model.parameters())


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_parts_that_do_not_belong_together_are_refused_in_one_sentence(tiny, mini, internals):
    prior, _, vae = mini
    good = tiny.conditioning(1)

    def check(words, model, vae, positive, **more):
        with pytest.raises(ValueError, match=words) as caught:
            internals.CriticInputs(model, vae, positive, good, 7.5, **more).check()
        assert "\n" not in str(caught.value)

    check("positive conditioning of width 24.*found width 12", tiny.prior(), vae, [[torch.zeros(1, 77, 12), {}]])
    check("expected positive to hold a conditioning", tiny.prior(), vae, [])
    check("expected the VAE of the SD15 model with 4 latent channels.*found no VAE", tiny.prior(), object(), good)
    flow = copy.copy(vae)
    flow.latent_channels, flow.first_stage_model = 16, torch.nn.Linear(1, 1)
    check("found Linear with 16 latent channels", tiny.prior(), flow, good)
    check("source conditioning of width 24", tiny.prior(), vae, good, source=[[torch.zeros(1, 77, 12), {}]])
    with pytest.raises(ValueError, match="multiple of 8 px.*found 60 px"):
        internals.latent_shape(vae, prior, 60, 1)


def test_models_without_noise_levels_of_this_kind_are_refused(tiny, comfyui, internals):
    model = tiny.prior().clone()

    class Flow(comfyui.model_sampling.ModelSamplingDiscreteFlow, comfyui.model_sampling.CONST):
        pass

    model.add_object_patch("model_sampling", Flow(model.model.model_config))
    with pytest.raises(ValueError, match="expected an eps- or v-prediction model.*flow kind"):
        internals.noise_schedule(model)
    zero_snr = internals.noise_schedule(tiny.prior(prediction="V_PREDICTION", zero_snr=True))
    assert zero_snr.sigma_max > 4000
